"""What a run did: `report.md` with pictures, and several seeds side by side. matplotlib is loaded when something is drawn."""

from turnwise.report.changes import Change, changes
from turnwise.report.plots import plot_seeds
from turnwise.report.run import Run, load_metrics
from turnwise.report.seeds import seeds_table
from turnwise.report.write import write_report

__all__ = ["Change", "Run", "changes", "load_metrics", "plot_seeds", "seeds_table", "write_report"]
