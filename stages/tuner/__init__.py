"""One PEFT tuner of ours: a frozen linear layer and a trained update of its weight, in one of several forms.

PEFT has none of these methods, or another one under a similar name. Importing the package makes the tuner known to
PEFT, so `PeftModel.from_pretrained` reads adapters that were saved with it.
"""

from stages.tuner.config import UpdateConfig
from stages.tuner.model import UpdateModel
from stages.tuner.registration import register

register(UpdateConfig, UpdateModel)

__all__ = ["UpdateConfig", "UpdateModel"]
