"""Our optimizers in Megatron-Core: importing this registers each as ``shardstep_<name>``.

``torchrun ... -m shardstep.core.megatron pretrain_gpt.py --optimizer shardstep_muon ...`` runs an unmodified script with them,
and with ``SHARDSTEP_MEGATRON=1`` in the environment no command changes at all.
"""

from .layer_wise import tag_whole
from .registration import register, replace_muon

register()

__all__ = ["register", "replace_muon", "tag_whole"]
