"""Train a model on GSM-Infinite and test it by the number of operations (the paper's sections 6.3 and 6.4).

accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/gsm_inf.py recipes/configs/ouro_1.4b_hard.yaml
"""

from sleepify.training.recipe import run

if __name__ == "__main__":
    run("gsm_inf", description=__doc__)
