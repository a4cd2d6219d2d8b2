"""The page; only this package imports gradio."""

try:
    import spaces  # on a Hugging Face Space; wants to be there before torch
except ImportError:
    spaces = None


def on_gpu(generator):
    """On ZeroGPU, runs a generator function where the GPU is: in a forked process, so that
    arguments and items must be picklable. Elsewhere the function itself."""
    return generator if spaces is None else spaces.GPU(generator)
