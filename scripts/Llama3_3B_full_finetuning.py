"""Full fine-tuning of Llama 3.2 3B, or of any model by --model_name; `--help` lists the flags."""

import sys

from playbook import main

if __name__ == "__main__":
    sys.exit(main("Llama3_3B_full_finetuning"))
