"""LoRA fine-tuning of Llama 3.1 70B.

--model_name selects another model. --help lists all flags.
"""

import sys

from playbook import main

if __name__ == "__main__":
    sys.exit(main("Llama3_70B_LoRA_finetuning"))
