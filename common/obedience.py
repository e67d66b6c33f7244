"""What a process makes of the words of monitors: whom it obeys, when it greets, when it asks. Pure.

    stranger --Welcome--> welcomed --new term; monitor does not know it; something new to say--> stranger

A stranger says Hello again and again. Who hears of a newer view or directory than it has asks for them (PROTOCOL 3.3,
3.5); who got that view and is not in its epoch all the same (a standby never is) asks now and then.
`common.monitor_client` is the shell of it.
"""

from dataclasses import dataclass, field

from common.allegiance import Allegiance
from common.ids import Epoch
from common.messages import Directory, HeartbeatReply, Message, Prepare, View, Welcome

_PATIENT_REPLIES = 10


@dataclass(slots=True)
class Obedience:
    """``num_words`` counts accepted words and heartbeat replies: silence of the monitor is when it stands still."""

    is_welcomed: bool = False
    num_words: int = 0
    _allegiance: Allegiance = field(default_factory=Allegiance)
    _directory_version: int = 0
    _newest_epoch: int = 0  # of the views that came
    _num_behind: int = 0  # heartbeat replies that told of that epoch while this process was not in it

    @property
    def term(self) -> int:
        return self._allegiance.term

    @property
    def monitor(self) -> str:
        return self._allegiance.monitor

    def accepts(self, word: View | Directory) -> bool:
        """For what came another way (bus, peers): the same allegiance decides."""
        if not self._allegiance.accepts(word.term, word.monitor):
            return False
        if isinstance(word, View):
            self._newest_epoch = max(self._newest_epoch, word.epoch)
        return True

    def on_message(self, message: Message) -> bool:
        """From a monitor's control socket. False: it is of a monitor that this process does not obey. Words that name
        no monitor are for whoever they reach."""
        signed = message.view if isinstance(message, Prepare) else message
        term, monitor = getattr(signed, "term", None), getattr(signed, "monitor", None)
        if term is not None and monitor is not None and not self._allegiance.accepts(term, monitor):
            return False
        self.num_words += 1
        if isinstance(message, Welcome):
            self.is_welcomed, self._directory_version = True, message.directory.version
            if message.view is not None:
                self._newest_epoch = max(self._newest_epoch, message.view.epoch)
        elif isinstance(message, Directory):
            self._directory_version = message.version
        elif isinstance(message, View):
            self._newest_epoch = max(self._newest_epoch, message.epoch)
        return True

    def on_reply(self, reply: HeartbeatReply, epoch: Epoch) -> bool:
        """``epoch``: of the view that this process has. True: it lacks something, and should ask for the view."""
        new_term = reply.term > self.term
        if not self._allegiance.accepts(reply.term, reply.monitor):
            return False
        self.num_words += 1
        if new_term or not reply.known:
            self.is_welcomed = False
            return False
        if reply.directory_version > self._directory_version or reply.epoch > max(epoch, self._newest_epoch):
            return True
        self._num_behind = self._num_behind + 1 if reply.epoch > epoch else 0
        return self._num_behind > 0 and self._num_behind % _PATIENT_REPLIES == 0
