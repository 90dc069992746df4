"""The watchdog ends a real process that hangs, and leaves its stacks."""

import subprocess
import sys
import textwrap


def ends_with(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_a_step_that_takes_too_long_ends_the_process_with_its_stacks():
    code, said = ends_with("""
        import time
        from ftray.train.watch import Watchdog

        def stuck_in_a_collective():
            time.sleep(50)

        with Watchdog(0.5, lambda stacks: print(stacks, flush=True)):
            stuck_in_a_collective()
    """)
    assert code == 70
    assert "stuck_in_a_collective" in said


def test_beats_keep_the_process_alive():
    code, said = ends_with("""
        import time
        from ftray.train.watch import Watchdog

        with Watchdog(1.0, print) as watchdog:
            for _ in range(20):
                time.sleep(0.1)
                watchdog.beat()
        print("through")
    """)
    assert (code, said) == (0, "through\n")


def test_a_worker_that_waits_for_one_that_gave_up_ends():
    code, _ = ends_with("""
        import time
        from ftray.train import watch

        watch.ASK_S = 0.4
        with watch.Watchdog(50, print, stopped=lambda: True):
            time.sleep(50)
    """)
    assert code == 71
