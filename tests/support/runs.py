"""How often a captured model runs."""

from tmx_compile.analysis import CapturedModel


class Runs:
    """Counts the calls of the captured model, and stops after some."""

    def __init__(self, monkeypatch, most=10**9):
        self.count, self.most = 0, most
        original = CapturedModel._run

        def counted(captured, *args):
            if self.count == self.most:
                raise KeyboardInterrupt
            self.count += 1
            return original(captured, *args)

        monkeypatch.setattr(CapturedModel, "_run", counted)
