"""What the loss is: one file a method. The recipe's `method` is a name of this table."""

from tunesmith.methods.base import Method
from tunesmith.methods.sft import SupervisedFineTuning

METHODS: dict[str, Method] = {"sft": SupervisedFineTuning()}
