"""Hugging Face transformers: importing this package registers the model type `whimbrel` with its Auto classes."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports
from whimbrel.errors import MissingExtraError

try:
    import transformers
except ImportError as error:
    raise MissingExtraError("whimbrel.integrations.hf needs transformers; run pip install 'whimbrel[hf]'") from error

from whimbrel.integrations.hf.attention import register as _register_attention
from whimbrel.integrations.hf.config import WhimbrelConfig as _Config
from whimbrel.integrations.hf.model import WhimbrelForCausalLM as _ForCausalLM
from whimbrel.integrations.hf.model import WhimbrelModel as _Model

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AveragingCallback": "whimbrel.integrations.hf.averaging:AveragingCallback",
        "OptimizerFactory": "whimbrel.integrations.hf.optimizer:OptimizerFactory",
        "WhimbrelCache": "whimbrel.integrations.hf.cache:WhimbrelCache",
        "WhimbrelConfig": "whimbrel.integrations.hf.config:WhimbrelConfig",
        "WhimbrelForCausalLM": "whimbrel.integrations.hf.model:WhimbrelForCausalLM",
        "WhimbrelModel": "whimbrel.integrations.hf.model:WhimbrelModel",
        "SparsePrefill": "whimbrel.integrations.hf.prefill:SparsePrefill",
        "convert_checkpoint": "whimbrel.integrations.hf.convert:convert_checkpoint",
        "enable_sparse_prefill": "whimbrel.integrations.hf.prefill:enable_sparse_prefill",
        "prefill_report": "whimbrel.integrations.hf.attention:prefill_report",
    },
)

transformers.AutoConfig.register(_Config.model_type, _Config, exist_ok=True)
transformers.AutoModel.register(_Config, _Model, exist_ok=True)
transformers.AutoModelForCausalLM.register(_Config, _ForCausalLM, exist_ok=True)
transformers.AutoTokenizer.register(_Config, fast_tokenizer_class=transformers.PreTrainedTokenizerFast, exist_ok=True)
_register_attention()
