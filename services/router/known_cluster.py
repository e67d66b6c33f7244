"""What this router knows of the cluster: the newest view, the newest directory, and whom to be linked with. Pure."""

from common.ids import Epoch, ProcessId
from common.messages import Directory, View


class KnownCluster:
    def __init__(self) -> None:
        self._view: View | None = None
        self._directory: Directory | None = None

    @property
    def epoch(self) -> Epoch:
        return self._view.epoch if self._view else Epoch(0)

    def take(self, message: View | Directory) -> bool:
        """Whether it says more than what is known."""
        if isinstance(message, View):
            if self._view is not None and message.epoch <= self._view.epoch:
                return False
            self._view = message
        else:
            known = self._directory
            if known is not None and (message.term, message.version) <= (known.term, known.version):
                return False
            self._directory = message
        return True

    def addresses(self) -> dict[ProcessId, str]:
        """Of decode ranks and prefill workers."""
        addresses: dict[ProcessId, str] = {}
        if self._view:
            addresses |= {member.process: member.endpoint for member in self._view.members}
        if self._directory:
            addresses |= {worker.process: worker.endpoint for worker in self._directory.of_kind("prefill")}
        return {process: address for process, address in addresses.items() if address}
