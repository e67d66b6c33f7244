"""A view that is to come next."""

from dataclasses import dataclass

from common.ids import Epoch
from common.messages import View


@dataclass(slots=True)
class Preparation:
    """A view that comes next if all get ready. ``ready``: a member has seen every newcomer's first header, and, where
    there is none, holds the experts of its placement."""

    view: View
    base_epoch: Epoch
    mapped: bool = False
    ready: bool = False
