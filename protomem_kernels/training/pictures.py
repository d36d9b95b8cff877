"""The two pictures of a run: the ROC curve beside the baseline's, and the pairs that were hardest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from protomem_kernels.training.files import written_whole
from protomem_kernels.training.lettering import Lettering, lettering
from protomem_kernels.training.quiet import errors_alone

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

FONTS = "matplotlib.font_manager"  # a logger, which tells of weights that a font has not
INK, GREY, TRAINED, ACCEPT, REJECT = "#222222", "#8a8a8a", "#1f6fb4", "#b4381f", "#c98a00"


class Curve(NamedTuple):
    """A ROC curve with what its legend says."""

    name: str
    false_accepts: ArrayLike  # (T,) rates in [0, 1], ascending
    true_accepts: ArrayLike  # (T,)
    accuracy: float
    auc: float


class Pair(NamedTuple):
    """Two images that were compared, and how alike the encoder finds them."""

    first: Tensor  # (C, H, W) uint8, grey or colour
    second: Tensor  # like the first
    names: tuple[str, str]
    cosine: float


@errors_alone(FONTS)
def draw_roc(path: Path, trained: Curve, *baselines: Curve, subtitle: str) -> None:
    """Write the curves twice, side by side: linear, and with logarithmic false accepts where applications live."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4.8), layout="constrained")
    _title(figure, f"Verification\n{subtitle}", lettering([subtitle]))
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        for curve, colour, style in zip((trained, *baselines), (TRAINED, INK, GREY), ("-", "-.", "--"), strict=False):
            label = f"{curve.name}: accuracy {curve.accuracy:.3f}, AUC {curve.auc:.3f}"
            line = {"color": colour, "label": label, "linewidth": 2, "drawstyle": "steps-post"}
            axes.plot(curve.false_accepts, curve.true_accepts, style, **line)
        axes.set(xscale=scale, xlim=(1e-3 if scale == "log" else -0.01, 1), ylim=(0, 1.01))
        axes.set(xlabel="False accept rate", ylabel="True accept rate")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if scale == "linear":
            axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
            axes.legend(loc="lower right", frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})


@errors_alone(FONTS)
def draw_pairs(path: Path, false_accepts: Sequence[Pair], false_rejects: Sequence[Pair], subtitle: str) -> None:
    """Write a contact sheet: the most alike pairs of two identities above, the least alike pairs of one below."""
    import matplotlib.figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 4
    blocks = (
        ("Different identities, found alike (false accepts)", ACCEPT, false_accepts),
        ("One identity, found different (false rejects)", REJECT, false_rejects),
    )
    rows = [max(1, -(-len(pairs) // columns)) for _, _, pairs in blocks]
    apart = ConstrainedLayoutEngine(wspace=0.06)  # pairs stand apart, their halves together
    figure = matplotlib.figure.Figure(figsize=(11, 2.0 * sum(rows) + 1.6), layout=apart)
    letters = lettering([subtitle, *(name for pair in (*false_accepts, *false_rejects) for name in pair.names)])
    _title(figure, f"The hardest pairs\n{subtitle}", letters)
    halves: Any = figure.subfigures(2, 1, height_ratios=[n + 0.25 for n in rows], hspace=0.02)
    for block, (title, colour, pairs), count in zip(halves, blocks, rows, strict=True):
        block.suptitle(title if pairs else f"{title}: none", color=colour, fontsize=11, fontweight="bold")
        for axes, place in zip(block.subplots(count, columns, squeeze=False).flat, range(count * columns), strict=True):
            if place < len(pairs):
                _draw_pair(axes, pairs[place], letters)
            else:
                axes.set_axis_off()
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _title(figure: Figure, text: str, letters: Lettering) -> None:
    title = figure.suptitle(letters.spell(text), color=INK, fontsize=12, fontfamily=letters.families)
    title.set_parse_math(False)  # a dollar is a dollar


def _draw_pair(axes: Any, pair: Pair, letters: Lettering) -> None:
    """Show the two images of a pair edge to edge, their names and cosine below."""
    gap = pair.first.new_full((*pair.first.shape[:2], 3), 255)
    image = torch.cat((pair.first, gap, pair.second), dim=2).movedim(0, 2)  # (H, 2 W + 3, C)
    axes.imshow(image.expand(-1, -1, 3).numpy())
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    names = letters.spell(f"{pair.names[0]}  |  {pair.names[1]}")
    text = f"{names}\ncosine {pair.cosine:+.2f}"
    axes.set_xlabel(text, fontsize=8.5, color=INK, fontfamily=letters.families, parse_math=False)
