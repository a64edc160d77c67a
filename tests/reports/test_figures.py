"""Figures: what must fit, fits."""

from types import SimpleNamespace

import pytest

from reports import figures, plotting


@pytest.mark.parametrize("num_methods", [3, 25])
def test_a_legend_of_any_length_stays_below_the_plots(num_methods):
    settings = [
        SimpleNamespace(method=f"m{i}", title=f"Method number {i}", is_policy=False) for i in range(num_methods)
    ]
    with plotting.style():
        figure = plotting.new_figure(figures.WIDTH, 4)
        axes = figure.subplots()
        axes.set_xlabel("cost")
        figures.layout(figure)
        before = axes.get_position().height * 4
        foot = figures.legend(figure, settings)
        figure.canvas.draw()
        assert axes.get_position().height * figure.get_size_inches()[1] == pytest.approx(before)
        inches = figure.dpi_scale_trans.inverted()
        words = figure.legends[0].get_window_extent().transformed(inches)
        assert 0 <= words.y0 and words.y1 <= foot and 0 <= words.x0 and words.x1 <= figures.WIDTH
        assert axes.get_tightbbox().transformed(inches).y0 >= foot
