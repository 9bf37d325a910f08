"""PyTorch: the backend ``convgen`` of ``torch.compile``, and exported programs.

What stays outside of a network is logged by ``logging.getLogger("convgen.bridges.torch")``, with the reason.
"""
