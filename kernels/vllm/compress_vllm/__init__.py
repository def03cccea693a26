"""The plug-in for vLLM: quantization method "compress", the native layout of compress-llm."""


def register() -> None:
    """Make vLLM know the method; it calls this in each of its processes. Raises ImportError without compress-llm."""
    try:
        import compress.kernels.inference  # noqa: F401
    except ImportError as error:
        raise ImportError(f"compress-vllm lacks a part of compress-llm ({error}): pip install --no-deps compress-llm, "
                          "then pip install compress-vllm") from error  # fmt: skip
    import compress_vllm.config  # noqa: F401
