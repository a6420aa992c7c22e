"""Kimi Recursive: give a pretrained decoder a recursive loop and measure what it does."""

from kimi_recursive.doors import follow, offer

__version__ = "0.1.0"

__getattr__, __dir__ = offer(
    __name__,
    model="RecursiveConfig get_baseline_config get_after_surgery_config get_phase_a_config "
    "get_phase_b_config get_phase_c_config RefineCell LatentToken TokenFeedback BoundaryHead "
    "ChunkRefineWrapper generate_chunks load_model_with_config KimiRecursiveConfig "
    "KimiRecursiveForCausalLM",
    training="ExperimentTracker",
)

# The Auto classes of transformers learn of our models, whoever of the two is imported first.
follow("transformers.models.auto.configuration_auto", "kimi_recursive.model.native_config")
