"""Adaptation methods, one file each. A method is one import and one name in `Method`.

A method's file holds its spec and two verbs:

- ``prepare(model, start)``: turn the loaded start model into the one that trains, and say which
  parameters will be trainable;
- ``finish(model, start)``: turn the trained model into a plain one of the start's architecture, in float32.

Heavy imports stay inside functions: `trivium validate` and `plan` read these files and import no torch.
"""

from typing import Annotated

from pydantic import Field

from stages.methods.full import Full
from stages.methods.lora import Lora
from stages.methods.qlora import Qlora
from stages.methods.spectrum import Spectrum

Method = Annotated[Full | Spectrum | Lora | Qlora, Field(discriminator="kind")]
"""THE registry of methods."""
