"""Adaptation methods, one file each. A method is one import and one name in `Method`.

A method's file holds its spec and two verbs:

- ``prepare(model, start)``: turn the loaded start model into the one that trains, and say which
  parameters will be trainable;
- ``finish(model, start)``: turn the trained model into a plain one of the start's architecture, in float32.

Heavy imports stay inside functions: `trivium validate` and `plan` read these files and import no torch.
"""

from typing import Annotated

from pydantic import Field

from stages.methods.adalora import Adalora
from stages.methods.bitfit import Bitfit
from stages.methods.bottleneck import Bottleneck
from stages.methods.dora import Dora
from stages.methods.full import Full
from stages.methods.glora import Glora
from stages.methods.llama_adapter import LlamaAdapter
from stages.methods.loftq import Loftq
from stages.methods.longlora import Longlora
from stages.methods.lora import Lora
from stages.methods.lora_fa import LoraFa
from stages.methods.lora_plus import LoraPlus
from stages.methods.lora_xs import LoraXs
from stages.methods.lq_lora import LqLora
from stages.methods.milora import Milora
from stages.methods.multi_lora import MultiLora
from stages.methods.olora import Olora
from stages.methods.pissa import Pissa
from stages.methods.prefix_tuning import PrefixTuning
from stages.methods.prompt_tuning import PromptTuning
from stages.methods.qa_lora import QaLora
from stages.methods.qlora import Qlora
from stages.methods.random_subset import RandomSubset
from stages.methods.rslora import RsLora
from stages.methods.spectrum import Spectrum
from stages.methods.svf import Svf
from stages.methods.svft import Svft
from stages.methods.tied_lora import TiedLora
from stages.methods.top_layers import TopLayers
from stages.methods.vera import Vera

Method = Annotated[
    # Whole weights
    Full
    | Spectrum
    | RandomSubset
    | TopLayers
    | Bitfit
    # Low rank
    | Lora
    | RsLora
    | LoraPlus
    | LoraFa
    | Dora
    | Adalora
    | Pissa
    | Milora
    | Olora
    | Vera
    | TiedLora
    | MultiLora
    | Glora
    # Through the SVD
    | Svf
    | Svft
    | LoraXs
    # Quantised
    | Qlora
    | Loftq
    | LqLora
    | QaLora
    # Long context
    | Longlora
    # Not mergeable: the last stage only
    | PrefixTuning
    | PromptTuning
    | Bottleneck
    | LlamaAdapter,
    Field(discriminator="kind"),
]
"""THE registry of methods."""
