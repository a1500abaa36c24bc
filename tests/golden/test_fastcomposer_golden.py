"""FastComposer against vectors of its published code: fused embeddings, the localization loss with
its gradients, and from which step fused embeddings are used."""

import pytest
import torch

from compressor.numerics.localization import localization, localization_loss, resized_masks
from compressor.numerics.subject_fusion import fuse, start_of, text_steps
from tests.support.golden_files import vectors


def test_fused_embeddings() -> None:
    given = vectors("systems/fastcomposer_postfuse")
    weights = {n.removeprefix("w."): t for n, t in given.items() if n.startswith("w.")}
    places = given["image_token_mask"].bool()
    found = fuse(
        weights, given["text_embeds"], given["object_embeds"], places, given["num_objects"]
    )
    torch.testing.assert_close(found, given["fused"], atol=1e-5, rtol=1e-4)
    assert torch.equal(found[~places], given["text_embeds"][~places])
    with pytest.raises(ValueError, match="positions are marked"):
        fuse(weights, given["text_embeds"], given["object_embeds"], places & False, places.sum(1))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_localization_loss_and_its_gradients(normalize: bool) -> None:
    given = vectors("systems/fastcomposer_localization")
    prefix = "norm." if normalize else ""
    masks, tokens = given["object_segmaps"], given["object_token_idx"]
    present = given["object_token_idx_mask"].bool()
    layers = {
        name.removeprefix("attn."): tensor.clone().requires_grad_()
        for name, tensor in given.items()
        if name.startswith("attn.")
    }
    for name, attention in layers.items():
        size = round(attention.shape[1] ** 0.5)
        resized = given[f"resized_segmap.{name}"]
        torch.testing.assert_close(resized_masks(masks, size), resized, atol=1e-5, rtol=1e-4)
        found = localization(attention, masks, tokens, present, normalize=normalize).mean()
        torch.testing.assert_close(found, given[f"{prefix}layer_loss.{name}"], atol=1e-5, rtol=1e-4)
    loss = localization_loss(layers, masks, tokens, present, normalize=normalize)
    torch.testing.assert_close(loss, given[f"{prefix}loss"], atol=1e-5, rtol=1e-4)
    loss.backward()
    compared = 0
    for name, attention in layers.items():
        if (expected := given.get(f"{prefix}grad.{name}")) is not None:
            torch.testing.assert_close(attention.grad, expected, atol=1e-7, rtol=1e-3)
            compared += 1
    assert compared == 2


def test_the_best_map_scores_minus_one_and_an_even_one_nothing() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    inside = mask.flatten(2).transpose(1, 2)
    tokens, present = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for attention, score in ((inside, -1.0), (1 - inside, 1.0), (inside * 0 + 0.3, 0.0)):
        found = localization(attention, mask, tokens, present)
        torch.testing.assert_close(found, torch.full((1, 1), score), atol=1e-4, rtol=0)


def test_steps_of_plain_text() -> None:
    given = vectors("systems/fastcomposer_schedule")
    for row, alpha in enumerate(given["alpha"].tolist()):
        for column, steps in enumerate(given["steps"].tolist()):
            start = start_of(alpha, steps)
            assert start == given["start_subject_conditioning_step"][row, column].item()
            assert text_steps(steps, start) == given["n_text_steps"][row, column].item()
    for start, expected in zip(
        given["start_merge_step"].tolist(), given["n_text_steps_of_50"].tolist(), strict=True
    ):
        assert text_steps(50, start) == expected
