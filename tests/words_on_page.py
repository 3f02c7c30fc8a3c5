"""The words of a picture, as they are drawn."""

from __future__ import annotations

from matplotlib.figure import Figure

from mui_callback.pictures.style import rendered


def assert_apart(figure: Figure) -> None:
    """No words of the page, its axes and ticks overlap others, or are out of the page."""
    rendered(figure)
    shown = [text for text in figure.texts if text.get_text()]
    for axes in figure.axes:
        shown += [axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):  # matplotlib has labels of ticks that are out of view, too
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            shown += [label for at, label in ticks if low <= at <= high]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    for number, (words, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0, words
        assert box.x1 <= figure.bbox.x1, words
        assert figure.bbox.y0 <= box.y0, words
        assert box.y1 <= figure.bbox.y1, words
        for other, its_box in boxes[:number]:
            assert not box.overlaps(its_box), (words, other)
