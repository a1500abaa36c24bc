"""Runs a vision-language model of the Qwen2-VL family over an endless video with StreamingVLM's
cache (arXiv 2510.09608): flat memory, contiguous positions."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

from compressor.attention.masked import OwnAttention, full
from compressor.attention.rope import Rotary, rotated
from compressor.attention.serve.stored_cache import stored_cache
from compressor.attention.token_classes import (
    FAMILIES,
    Round,
    StreamSizes,
    StreamState,
    kept_columns,
)
from compressor.errors import InputError

NAME = "streaming_vlm"


class VideoStream:
    """One conversation about a video.

    The cache holds keys as they are before the rotary embedding; each call turns all of them by the
    places that the kept tokens have now. Where the checkpoint has an 8-bit cache it holds codes, of
    keys before the embedding too. Every token of a reply is fed before the next round, so that the
    cache holds all that is kept; the released code lags by a token or two.
    """

    def __init__(
        self,
        model: Any,
        sizes: StreamSizes,
        *,
        before: Sequence[int],
        previous: Sequence[int],
        after: Sequence[int],
        seconds: float | None = None,
    ) -> None:
        """before, previous, after  token ids: the system prompt with the marker of the previous
                 text, that text, and its end
        seconds  places in time from one frame of a clip to the next; None: one for Qwen2-VL, what
                 the config says of a second for Qwen2.5-VL at two frames a second and two a step
        Raises InputError for a model of another family.
        """
        config = model.config
        if config.model_type not in FAMILIES:
            raise InputError(
                f"a video stream runs {' and '.join(FAMILIES)}, not {config.model_type}"
            )
        self.model, self.text = model, model.model.language_model
        rate = getattr(config.vision_config, "tokens_per_second", None)
        self.seconds = float(rate or 1) if seconds is None else seconds
        self._merge = int(config.vision_config.spatial_merge_size)
        self.ids: list[int] = []
        self.columns: list[int] = []
        self._fresh: dict[int, Tensor] = {}
        self.state = StreamState(
            sizes, self._number(before), self._number(previous), self._number(after)
        )
        self.cache = DynamicCache()
        if (rounding := stored_cache(model)) is not None:
            self.cache.layers = [layer.codes_layer() for layer in rounding]
        self._turn: Rotary | None = None
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _no_mask)
        self._usual = self.text.config._attn_implementation
        self.text.set_attn_implementation(NAME)
        names = inspect.signature(self.text.forward).parameters
        self._keyword = "cache" if "cache" in names else "past_key_values"
        self._hooks = [
            layer.self_attn.register_forward_pre_hook(self._before, with_kwargs=True)
            for layer in self.text.layers
        ]

    def detach(self) -> None:
        """Let the model attend as it did before."""
        for hook in self._hooks:
            hook.remove()
        self.text.set_attn_implementation(self._usual)

    @torch.no_grad()
    def ask(
        self,
        *,
        head: Sequence[int],
        text: Sequence[int],
        vision: Sequence[int],
        pixels: Tensor,
        grid: Tensor,
        tail: Sequence[int],
        reply_head: Sequence[int],
        query: Sequence[int] = (),
    ) -> Tensor:
        """Show a clip and ask: make room, take the question in. Gives the logits [vocabulary] that
        a reply begins with.

        head … reply_head  token ids of the question's parts, as `Round` names them; vision with its
                           markers and a placeholder for each token of the clip
        pixels, grid       of one clip, as the model's processor gives them
        """
        if self.state.rounds:
            self.state.make_room()
            self._drop()
        frames, rows, columns = (int(n) for n in grid.view(-1)[:3])
        clip = (frames, rows // self._merge, columns // self._merge)
        if len(vision) - 2 != clip[0] * clip[1] * clip[2]:
            raise InputError(
                f"a clip of {clip[0]} x {clip[1]} x {clip[2]} tokens has {len(vision) - 2} places"
            )
        asked = {"head": head, "text": text, "vision": vision, "query": query, "tail": tail}
        numbers = {name: self._number(part) for name, part in asked.items()}
        features = self.model.model.get_video_features(pixels, grid.view(1, 3), return_dict=True)
        places = numbers["vision"][1:-1]
        self._fresh = dict(zip(places, torch.cat(list(features.pooler_output)), strict=True))
        start = Round(**numbers, reply_head=self._number(reply_head), clip=clip)
        self.state.rounds.append(start)
        return self._feed()[-1]

    @torch.no_grad()
    def reply(
        self,
        first: Tensor,
        *,
        most: int,
        stop: Collection[int],
        rest: Sequence[int] = (),
        tail: Sequence[int],
    ) -> list[int]:
        """The likeliest reply of at most `most` tokens, from the logits that `ask` gave: its ids
        without what stopped it. rest, tail: what ends each reply, and its end."""
        found: list[int] = []
        logits = first
        while len(found) < most:
            token = int(logits.argmax())
            if token in stop:
                break
            found.append(token)
            self._extend(reply=self._number([token]))
            logits = self._feed()[-1]
        self._extend(reply_rest=self._number(rest), reply_tail=self._number(tail))
        self._feed()
        return found

    def _extend(self, **parts: tuple[int, ...]) -> None:
        now = self.state.rounds[-1]
        longer = {name: getattr(now, name) + more for name, more in parts.items()}
        self.state.rounds[-1] = replace(now, **longer)  # type: ignore[arg-type]

    def _number(self, ids: Sequence[int]) -> tuple[int, ...]:
        first = len(self.ids)
        self.ids += [int(token) for token in ids]
        return tuple(range(first, len(self.ids)))

    def _drop(self) -> None:
        """Have the cache hold what is left, in its order."""
        kept = kept_columns(self.columns, self.state.tokens)
        self.columns = [self.columns[int(at)] for at in kept]
        for layer in self.cache.layers:
            at = kept.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[:, :, at], layer.values[:, :, at]

    def _feed(self) -> Tensor:
        """Run what is not in the cache yet, [tokens, vocabulary]."""
        tokens = self.state.tokens
        new = tokens[len(self.columns) :]
        device = self.model.device
        hidden = self.text.embed_tokens(torch.tensor([[self.ids[t] for t in new]], device=device))
        for place, token in enumerate(new):
            if token in self._fresh:
                hidden[0, place] = self._fresh.pop(token).to(hidden.dtype)
        places = self.state.positions(seconds=self.seconds).to(device)[:, None]
        cos, sin = self.text.rotary_emb(hidden, places)
        self._turn = (cos[0], sin[0])
        # The whole model, since what unpacks weights hooks its first call.
        out = self.model(
            inputs_embeds=hidden,
            position_ids=places[:, :, -len(new) :],
            use_cache=True,
            streaming_vlm=self,
            **{self._keyword: self.cache},
        )
        self.columns += new
        logits: Tensor = out.logits[0]
        return logits

    def _before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hold the rotary embedding back, so that keys are cached as they are."""
        cos, sin = kwargs["position_embeddings"]
        still = (torch.ones_like(cos), torch.zeros_like(sin))
        return args, {**kwargs, "position_embeddings": still}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, own: OwnAttention) -> Tensor:
        """Attention of the new tokens, [rows, heads, n, head_dim], turned by where they stand."""
        if self._turn is None:
            raise InputError("a model that streams a video is run by its VideoStream")
        cos, sin = self._turn
        new = query.shape[2]
        query = rotated(query, (cos[-new:], sin[-new:]))
        return full(query, rotated(key, (cos, sin)), value, own)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """The registered attention function."""
    stream = options.get("streaming_vlm")
    if not isinstance(stream, VideoStream):
        raise InputError(f"a model that attends by {NAME!r} is run by its VideoStream")
    if options.get("sliding_window") is not None:
        raise InputError("a video stream is not for layers that have a window of their own")
    out = stream.attend(query, key, value, OwnAttention(scaling=float(options["scaling"])))
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **options: Any) -> None:
    """The registered mask function: what is in the cache is seen."""
