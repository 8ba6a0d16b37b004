"""What every row of BACKBONES must do, whatever it is made of (`networks.backbone.Backbone`)."""

from __future__ import annotations

import torch

from guided_mt.networks.model import BACKBONES
from guided_mt.networks.multi_task import MultiTask

WIDTH, CLASSES = 16, 7


def make(name: str, variant: str) -> MultiTask:
    """A tiny network with an image input and a token input, random weights everywhere."""
    torch.manual_seed(0)
    model = BACKBONES[name](
        heads={}, image_inputs={"masked": 3}, token_inputs={"label": lambda width: torch.nn.Linear(4, width)},
        variant=variant, context_dim=WIDTH, image_size=8, num_channels=32, num_res_blocks=1, num_heads=4, dropout=0.0,
        channel_mult="1,1", attention_resolutions="8,4", class_cond=True, num_classes=CLASSES, learn_sigma=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # layers that start at zero would hide everything behind them
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def check_backbone(name: str, variant: str) -> None:
    """Shapes; and that the output depends on all that is given, and on nothing that is left out."""
    model = make(name, variant)
    conditioned = variant != "U"
    assert (model.condition_channels > 0) == conditioned and model.num_classes == CLASSES
    x, t, y = torch.randn(2, model.in_channels, 8, 8), torch.tensor([1.0, 500.5]), torch.tensor([1, -1])
    condition = torch.randn(2, model.condition_channels, 8, 8) if conditioned else None
    context, mask = torch.randn(2, 3, WIDTH), torch.tensor([[True, True, False], [False, False, False]])

    def output(x=x, t=t, y=y, context=context, condition=condition, mask=mask):
        return model.output(model.features(x, t, y, context, condition, mask))

    with torch.no_grad():
        features, seen = model.features(x, t, y, context, condition, mask), output()
        assert features.last.shape == (2, model.feature_channels, 8, 8)
        assert features.middle.shape[:2] == (2, model.middle_channels)
        assert seen.shape == (2, 6, 8, 8) and seen.dtype == torch.float32
        assert model.make_output(5)(features.last).shape == (2, 5, 8, 8)

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
