"""One page about an adapter: what it is, what it does, and what that costs."""

from .contents import ReportContents, collect_report
from .page import render_report, write_report

__all__ = ["ReportContents", "collect_report", "render_report", "write_report"]
