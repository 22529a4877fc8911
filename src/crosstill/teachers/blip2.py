"""BLIP-2 (Li et al., arXiv 2301.12597): the contrastive heads of its Q-Former as a dual encoder."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2ForImageTextRetrieval

from crosstill.teachers.dual import DualEncoder
from crosstill.towers import hub
from crosstill.towers.processors import check_size

_log = logging.getLogger(__name__)


class Blip2Dual(DualEncoder):
    """The dual encoder within a `Blip2ForImageTextRetrieval` folder, to an approximation.

    BLIP-2 gives Q unit rows for an image, one for each query, and its score is the greatest of
    their Q cosines with the text's row (its section 3.1). No single row has those cosines. The row
    here is the mean of the Q, at length 1: its cosine is the mean of the Q cosines over the length
    of that mean. Texts' rows are BLIP-2's own.
    """

    def _read_model(self, config: Any) -> Any:
        check_size(self.folder, self.preprocess, config.vision_config.image_size)
        # older folders say so by another name, and the heads cannot do without
        config.qformer_config.use_qformer_text_input = True
        model = hub.read_model(self.folder, config, kind=Blip2ForImageTextRetrieval)
        self.family = "blip-2-itc-mean"
        _log.warning(
            "%s: an image's row is the mean of BLIP-2's %d query rows; BLIP-2 itself scores by the "
            "best of them",
            self.name,
            config.num_query_tokens,
        )
        return _Heads(model).requires_grad_(False).to(self.device)


class _Heads(nn.Module):
    """What `DualEncoder` asks of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        towers = model.config.vision_config, model.config.qformer_config
        self.config = SimpleNamespace(vision_config=towers[0], text_config=towers[1])
        self.vision_model, self.vision_projection = model.vision_model, model.vision_projection
        self.embeddings, self.text_projection = model.embeddings, model.text_projection
        self.qformer, self.query_tokens = model.qformer, model.query_tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state
        queries = self.query_tokens.expand(len(patches), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=patches)
        rows = self.vision_projection(hidden.last_hidden_state)
        return functional.normalize(rows, dim=-1).mean(dim=1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        words = self.embeddings(input_ids=input_ids)
        hidden = self.qformer(query_embeds=words, query_length=0, attention_mask=attention_mask)
        return self.text_projection(hidden.last_hidden_state[:, 0])
