"""What every row of BACKBONES must do, whatever it is made of (`networks.backbone.Backbone`)."""

from __future__ import annotations

import torch

from guided_mt.networks.multi_task import MultiTask
from guided_mt.runs.backbones import backbone_sections, build_backbone
from guided_mt.runs.config import Config, ModelConfig

WIDTH, CLASSES = 16, 7
FLAGS = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "num_heads": 4, "channel_mult": "1,1"}
FLAGS |= {"attention_resolutions": "8,4", "class_cond": True, "num_classes": CLASSES}
OWN = {"dit_patch_size": 2, "dit_hidden_size": 32, "dit_depth": 2, "dit_num_heads": 4}


def make(name: str, variant: str, **own: object) -> MultiTask:
    """A tiny network with an image input and a token input, random weights everywhere. own: flags of a backbone's own."""
    torch.manual_seed(0)
    values = {**OWN, **own}
    sections = [
        section(**{key: values[key] for key in section.__dataclass_fields__ if key in values})
        for section in backbone_sections()
    ]
    model = build_backbone(
        name,
        Config([ModelConfig(**FLAGS), *sections]),
        WIDTH,
        heads={},
        image_inputs={"masked": 3},
        token_inputs={"label": lambda width: torch.nn.Linear(4, width)},
        variant=variant,
        learn_sigma=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # layers that start at zero would hide everything behind them
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def check_backbone(name: str, variant: str, **own: object) -> None:
    """Shapes; and that the output depends on all that is given, and on nothing that is left out."""
    model = make(name, variant, **own)
    conditioned = variant != "U"
    assert (model.condition_channels > 0) == conditioned and model.num_classes == CLASSES
    x, t, y = torch.randn(2, model.in_channels, 8, 8), torch.tensor([1.0, 500.5]), torch.tensor([1, -1])
    condition = torch.randn(2, model.condition_channels, 8, 8) if conditioned else None
    context, mask = torch.randn(2, 3, WIDTH), torch.tensor([[True, True, False], [False, False, False]])

    def output(x=x, t=t, y=y, context=context, condition=condition, mask=mask):
        return model.output(model.features(x, t, y, context, condition, mask))

    with torch.no_grad():
        features, seen = model.features(x, t, y, context, condition, mask), output()
        assert features.last.shape[:2] == (2, model.feature_channels)
        assert features.middle.shape[:2] == (2, model.middle_channels)
        assert seen.shape == (2, 6, 8, 8) and seen.dtype == torch.float32
        read = [part for part in (features.last, features.embedding) if part is not None]
        assert model.make_output(5)(*read).shape == (2, 5, 8, 8)

        changed = {"x": -x, "t": t + 100, "y": 1 + y, "context": -context, "mask": None}
        if conditioned:
            changed["condition"] = -condition
        for key, value in changed.items():
            assert not torch.allclose(output(**{key: value})[0], seen[0]), key
        hidden = torch.where(mask[..., None], context, 9.0)
        torch.testing.assert_close(output(context=hidden), seen)
        torch.testing.assert_close(output(context=None, mask=None)[1], seen[1])  # all are left out of the second sample

        without = output(context=None, mask=None)
        of_context = list(model.context_parameters())
        for parameter in of_context:
            parameter.add_(torch.randn_like(parameter))
        torch.testing.assert_close(output(context=None, mask=None), without)
        assert of_context and not torch.allclose(output(), seen)
