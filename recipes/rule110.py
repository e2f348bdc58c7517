"""Train a model on Rule 110 and test it by the number of steps (the paper's sections 4 and 6.1).

accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/rule110.py recipes/configs/rule110_small.yaml
"""

from sleepify.training.recipe import run

if __name__ == "__main__":
    run("rule110", description=__doc__)
