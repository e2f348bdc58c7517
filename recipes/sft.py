"""Fine-tune a model on data of one's own: a name on the Hub, a folder, or a JSONL, Parquet or text file.

accelerate launch recipes/sft.py --model Qwen/Qwen3-0.6B --dataset notes.jsonl --window_size 512 --output_dir outputs/sft
"""

from sleepify.training.recipe import run

if __name__ == "__main__":
    run("sft", description=__doc__)
