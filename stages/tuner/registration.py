"""Make a tuner known to PEFT, which has no public way to add a kind of adapter from outside.

`register_peft_method` refuses names that its enumeration lacks, so a member is added through the private tables of
`enum`. A test holds this against the versions of Python and PEFT that the lock file names.
"""

from typing import Any

NAME = "TRIVIUM"
"""The ``peft_type`` in the adapter_config.json of our adapters."""
PREFIX = "trivium_"
"""What the names of modules that belong to the tuner start with."""


def peft_type(name: str = NAME) -> Any:
    """Our member of PEFT's enumeration of adapter kinds, added if it is not there yet."""
    from peft import PeftType

    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member.__objclass__ = PeftType
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType(name)


def register(config: type, model: type, name: str = NAME, prefix: str = PREFIX) -> None:
    """Let PEFT build ``model`` from ``config``; a second call changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if peft_type(name) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=prefix)
