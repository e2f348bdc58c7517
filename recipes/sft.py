"""Fine-tune a model on data of one's own: a name on the Hub, a folder, or a JSONL, Parquet or text file.

accelerate launch recipes/sft.py recipes/configs/sft_tiny.yaml --dataset notes.jsonl --output_dir outputs/notes
"""

import sys

from sleepify.training import DatasetError
from sleepify.training.recipe import run

if __name__ == "__main__":
    try:
        run("sft", description=__doc__)
    except DatasetError as error:
        sys.exit(f"error: {error}")
