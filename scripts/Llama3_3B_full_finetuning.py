"""Full fine-tuning of Llama 3.2 3B.

--model_name selects another model. --help lists all flags.
"""

import sys

from playbook import main

if __name__ == "__main__":
    sys.exit(main("Llama3_3B_full_finetuning"))
