"""Train a model to walk k steps along a cycle that it read before its window was evicted, and test it by k.

accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/hops.py recipes/configs/hops_small.yaml
"""

from sleepify.training.recipe import run

if __name__ == "__main__":
    run("hops", description=__doc__)
