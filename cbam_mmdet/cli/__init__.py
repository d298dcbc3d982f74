"""What the tools share: messages for strangers' exceptions, and how a tool ends."""

from cbam_mmdet.cli.tool import run_tool

__all__ = ['run_tool']
