"""What the figures show: the numbers drawn, not that something was drawn."""

import io
import math
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.patches import StepPatch

from fastood import plots


def drawn(figure):
    """Rendering runs all of matplotlib, and warnings are errors here."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    return figure


def test_heatmap_annotates_every_cell():
    auroc = np.linspace(0.3, 0.98, 8).reshape(2, 4)
    figure = drawn(plots.heatmap(auroc, ["energy", "tv"], [None, 0.3, 2, math.inf]))
    ax = figure.axes[0]
    assert {t.get_position(): t.get_text() for t in ax.texts} == {
        (j, i): f"{auroc[i, j]:.3f}" for i in range(2) for j in range(4)
    }
    assert [t.get_text() for t in ax.get_xticklabels()] == ["U = 1", "0.3", "2", "∞"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["energy", "tv"]
    assert "higher is better" in ax.get_title()
    np.testing.assert_array_equal(ax.images[0].get_array(), auroc)


def test_heatmap_text_stands_out_from_its_cell():
    figure = drawn(plots.heatmap([[0.1, 0.45, 0.55, 0.9]], ["tv"], [0, 1, 2, 3]))
    ax = figure.axes[0]
    for text, cell in zip(ax.texts, ax.images[0].get_array()[0], strict=True):
        background = luminance(ax.images[0].to_rgba(cell))
        light, dark = sorted([background, luminance(matplotlib.colors.to_rgb(text.get_color()))], reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5  # WCAG AA


def luminance(rgb):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb[:3]]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def test_heatmap_of_one_value():
    figure = drawn(plots.heatmap(np.full((1, 2), 0.5), ["tv"], [1, 2]))
    assert [t.get_text() for t in figure.axes[0].texts] == ["0.500", "0.500"]


def test_heatmap_says_which_shape_is_wanted():
    with pytest.raises(ValueError, match=r"auroc must be \[2, 1\], a row per v, got shape \[1, 2\]"):
        plots.heatmap([[0.5, 0.5]], ["tv", "msp"], [1])


def bars(figure):
    """Legend label -> (heights, bin edges)."""
    patches = [p for p in figure.axes[0].patches if isinstance(p, StepPatch)]
    return {p.get_label(): p.get_data()[:2] for p in patches}


def test_histograms_show_every_input_as_a_share():
    rng = np.random.default_rng(0)
    inside, near, far = rng.normal(2, 1, 900), rng.normal(0, 1, 200), rng.normal(-3, 1, 50)
    figure = drawn(plots.histograms(inside, {"near": near, "far": far}, "energy*||h||_0.3"))
    assert figure.axes[0].get_title() == "energy*||h||_0.3"
    assert "higher = more in-distribution" in figure.axes[0].get_xlabel()
    shown = bars(figure)
    assert list(shown) == ["ID", "OOD: near", "OOD: far"]
    for name, scores in (("ID", inside), ("OOD: near", near), ("OOD: far", far)):
        heights, edges = shown[name]
        assert heights.sum() == pytest.approx(1)
        # The middle bins hold what lies between their edges.
        within = [((scores >= a) & (scores < b)).mean() for a, b in pairwise(edges)]
        np.testing.assert_allclose(heights[1:-1], within[1:-1], atol=1e-12)


def test_one_wild_score_does_not_squeeze_the_rest():
    scores = np.append(np.linspace(0, 1, 999), 1e30)
    heights, edges = bars(drawn(plots.histograms(scores, {"o": scores}, "s")))["ID"]
    assert edges[-1] < 1.1
    assert (heights > 0).all()
    assert heights.sum() == pytest.approx(1)


def test_infinite_scores_count_at_the_edges():
    inside = [math.inf] * 3 + [1.0, 2.0, 3.0]
    outside = [-math.inf] * 2 + [1.0, 2.0]
    shown = bars(drawn(plots.histograms(inside, {"o": outside}, "log")))
    assert shown["ID"][0][-1] >= 0.5
    assert shown["OOD: o"][0][0] >= 0.5
    for heights, edges in shown.values():
        assert heights.sum() == pytest.approx(1)
        assert np.isfinite(edges).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e25, math.inf, -math.inf])
def test_constant_scores_are_one_bar(value):
    for heights, edges in bars(drawn(plots.histograms([value] * 4, {"o": [value]}, "constant"))).values():
        assert sorted(heights)[-2:] == [0, 1]
        assert np.isfinite(edges).all()


def test_scores_further_apart_than_float64_counts_have_an_axis():
    far = np.array([-1.7e308, 1.7e308])
    shown = bars(drawn(plots.histograms(far, {"far": far}, "s")))
    assert [heights.sum() for heights, _ in shown.values()] == [1, 1]


def test_scores_a_rounding_apart_have_an_axis():
    shown = bars(drawn(plots.histograms([1.0, 1 - 2**-53], {"o": [1.0, 1 - 2**-52]}, "msp")))
    assert all(heights.sum() == pytest.approx(1) for heights, _ in shown.values())


@pytest.mark.parametrize("scale", [1, 10])
def test_a_line_marks_the_threshold(scale):
    rng = np.random.default_rng(0)
    inside, outside = scale * rng.normal(3, 1, 999), scale * rng.normal(0, 1, 300)
    ax = drawn(plots.histograms(inside, {"o": outside}, "s")).axes[0]
    (line,) = ax.lines
    t = line.get_xdata()[0]
    assert (inside >= t).mean() >= 0.95 > (inside > t).mean()
    (text,) = ax.texts
    assert text.get_text() == f"95% of ID ≥ {t:.4g}"


@pytest.mark.parametrize(("infinite", "side", "ha"), [(-math.inf, 0, "left"), (math.inf, -1, "right")])
def test_an_infinite_threshold_is_at_its_end(infinite, side, ha):
    inside = [infinite] * 19 + [1.0]
    figure = drawn(plots.histograms(inside, {"o": [0.0, 2.0]}, "s"))
    assert figure.axes[0].lines[0].get_xdata()[0] == bars(figure)["ID"][1][side]
    assert figure.axes[0].texts[0].get_text() == f"95% of ID ≥ {infinite}"
    assert figure.axes[0].texts[0].get_ha() == ha


def test_a_large_set_does_not_squeeze_a_small_one():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(9, 1, 100), rng.normal(0, 1, 100_000)
    shown = bars(plots.histograms(inside, {"o": outside}, "s"))
    assert all((heights > 0).sum() > 10 for heights, _ in shown.values())


def test_sets_differ_in_print_without_colours():
    sets = {str(i): [i / 9, 1.0] for i in range(4)}
    patches = plots.histograms([1.0, 2.0], sets, "s").axes[0].patches
    assert [p.get_fill() for p in patches] == [True] + 4 * [False]
    assert len({p.get_linestyle() for p in patches[1:]}) == 4


def test_long_names_are_not_cut_off():
    name = "an out-of-distribution set with a long name"
    figure = drawn(plots.histograms([1.0, 2.0], {name: [0.0], "b": [1.0]}, "s"))
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.axes[0].xaxis.label.get_window_extent().y0 + 1


def test_names_are_not_mathematics():
    figure = drawn(plots.histograms([1.0, 2.0], {"$\\frac$": [0.0], "_hidden": [0.5]}, "a$b$"))
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == ["ID", "OOD: \\$\\frac\\$", "OOD: _hidden"]


def test_more_sets_than_colours():
    assert len(bars(drawn(plots.histograms([1.0, 2.0], {str(i): [i / 9] for i in range(9)}, "s")))) == 10


def test_simplex_shows_the_three_v_terms():
    figure = drawn(plots.simplex())
    corners = {(0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(0.75))}
    at_corners, in_the_middle = [0, 1, 2 / 3], [2 / 3, 1 / 3, 0]
    titles = ("ExGrad", "MSP", "GradNorm")
    maps = [ax for ax in figure.axes if ax.get_title()]
    assert len(maps) == 3
    for ax, title, corner, middle in zip(maps, titles, at_corners, in_the_middle, strict=True):
        assert ax.get_title().startswith(title)
        (mesh,) = (c for c in ax.collections if hasattr(c, "_triangulation"))
        values, grid = mesh.get_array(), mesh._triangulation
        found = {}
        for x, y, value in zip(grid.x, grid.y, values, strict=True):
            for cx, cy in corners | {(0.5, math.sqrt(0.75) / 3)}:
                if math.hypot(x - cx, y - cy) < 1e-9:
                    found[cx, cy] = value
        assert [found.pop(c) for c in corners] == pytest.approx([corner] * 3, abs=1e-12)
        assert list(found.values()) == pytest.approx([middle], abs=1e-12)
        # lighter to darker
        assert luminance(mesh.cmap(0.0)) > luminance(mesh.cmap(1.0))
        assert (values.min(), values.max()) == pytest.approx(tuple(sorted((corner, middle))), abs=1e-12)


def test_no_pyplot_state():
    import matplotlib.pyplot as plt

    plots.simplex()
    plots.histograms([1.0], {"o": [0.0]}, "s")
    assert plt.get_fignums() == []
