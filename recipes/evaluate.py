"""Test one checkpoint at any N and windows, on the task or data that it was trained on or others; perplexity of a text.

python recipes/evaluate.py --model outputs/rule110_small --n_loops 1 2 4 8 --plot accuracy.png
python recipes/evaluate.py --model outputs/notes --dataset other.jsonl --n_loops 1 4
python recipes/evaluate.py --model outputs/ouro --n_loops 1 4 --text_file notes.txt --context 8192
"""

from sleepify.training.evaluate_checkpoint import run

if __name__ == "__main__":
    run(description=__doc__)
