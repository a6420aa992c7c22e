"""The recursive loop around a decoder, and what saves and loads it."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    config="RecursiveConfig get_baseline_config get_after_surgery_config "
    "get_phase_a_config get_phase_b_config get_phase_c_config",
    cells="RefineCell LatentToken TokenFeedback BoundaryHead",
    loop="ChunkLoop ChunkState",
    wrapper="ChunkRefineWrapper",
    native_config="KimiRecursiveConfig",
    native="KimiRecursiveForCausalLM",
    generation="generate_chunks",
    output="GenerationStats",
    loading="load_base load_model_with_config build_wrapper load_tokenizer",
    sidecar="save_sidecar load_sidecar",
    adapter="Adapter",
)
