"""How much memory a process and its workers held at most, for the benchmarks beside this file."""

import os
import threading
import time
from pathlib import Path


class Memory(threading.Thread):
    """Watches the largest resident sets in MiB, as Linux keeps them, of processes.

    (The kernel's `ru_maxrss` begins with that of the process that started this one.)
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.worker = 0.0

    def run(self) -> None:
        """Keeps `worker`, that of the largest child so far."""
        me = os.getpid()
        while True:
            children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
            self.worker = max([self.worker, *map(self.peak, children)])
            time.sleep(0.2)

    @staticmethod
    def peak(process: str) -> float:
        """Of one process; 0 once it is gone."""
        try:
            text = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return 0.0
        return float(text.partition("VmHWM:")[2].split()[0]) / 2**10 if "VmHWM:" in text else 0.0
