"""Step folders of a run: weights in safetensors, the training state, and a list of what must be there."""

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Meta": "whimbrel.checkpoint.steps:Meta",
        "check_complete": "whimbrel.checkpoint.steps:check_complete",
        "latest_checkpoint": "whimbrel.checkpoint.steps:latest_checkpoint",
        "list_checkpoints": "whimbrel.checkpoint.steps:list_checkpoints",
        "load_checkpoint": "whimbrel.checkpoint.full:load_checkpoint",
        "load_tensors": "whimbrel.checkpoint.full:load_tensors",
        "load_weights": "whimbrel.checkpoint.weights:load_weights",
        "prune": "whimbrel.checkpoint.full:prune",
        "read_meta": "whimbrel.checkpoint.steps:read_meta",
        "restore_rng": "whimbrel.checkpoint.rng:restore_rng",
        "rng_state": "whimbrel.checkpoint.rng:rng_state",
        "save_checkpoint": "whimbrel.checkpoint.full:save_checkpoint",
        "save_weights": "whimbrel.checkpoint.weights:save_weights",
        "step_dir": "whimbrel.checkpoint.steps:step_dir",
    },
)
