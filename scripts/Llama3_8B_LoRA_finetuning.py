"""LoRA fine-tuning of Llama 3.1 8B.

--model_name selects another model. --help lists all flags.
"""

import sys

from playbook import main

if __name__ == "__main__":
    sys.exit(main("Llama3_8B_LoRA_finetuning"))
