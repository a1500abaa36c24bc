"""Imports of transformers that all its models need, without what they take along unused."""


def import_generation() -> None:
    """What transformers' models and tokenizers import of generation, as if there were no
    scikit-learn: releases up to 5.17 import it where it is installed, and SciPy, for a way of
    generating that is not used here. Before anything else of transformers that imports models."""
    from transformers import utils

    known = utils.is_sklearn_available
    utils.is_sklearn_available = lambda: False
    try:
        import transformers.generation.candidate_generator  # noqa: F401
    finally:
        utils.is_sklearn_available = known


def import_models() -> None:
    """What all models of transformers import, before it is known which one is wanted."""
    import_generation()
    import transformers.masking_utils
    import transformers.modeling_layers
    import transformers.modeling_rope_utils
    import transformers.modeling_utils  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
