from __future__ import annotations

import pytest
from rich.table import Table

from fedcompose import console


def printed(width: int, print_it: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    table = Table("folder", "digest", box=None)
    table.add_row("/a/long/path/" + "x" * 60, "d" * 64)
    print_it(table)  # type: ignore[operator]
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [20, 80, 300])
def test_nothing_of_a_table_is_cut_on_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, row = printed(width, console.print_whole, monkeypatch, capsys).splitlines()
    assert row.split() == ["/a/long/path/" + "x" * 60, "d" * 64]
    assert len(row) < 200


def test_an_ordinary_table_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control."""
    assert "d" * 64 not in printed(20, console.Console().print, monkeypatch, capsys)
