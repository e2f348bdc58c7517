"""Train a model on Depo, walks along a cycle, and test it by the number of hops (the paper's section 6.2).

accelerate launch --config_file recipes/accelerate/single_gpu.yaml recipes/depo.py recipes/configs/depo_k16.yaml
"""

from sleepify.training.recipe import run

if __name__ == "__main__":
    run("depo", description=__doc__)
