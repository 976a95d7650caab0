#!/usr/bin/env python3
"""tools/report: its numbers against numbers worked out by hand, sweeps in every state, and the page."""
import json
import math
import os
import unittest
from pathlib import Path

from made_up_sweeps import Sweeps, dump, start, step, validation
import report_figures
import sweep_compare


class Report(Sweeps):
    def test_numbers_worked_out_by_hand(self):
        directory = self.two_seeds()
        page, arms, lines = self.make(directory)
        moe, dense = arms["experts-8"], arms["dense"]
        self.assertEqual([moe[key] for key in ("label", "parameters", "active_parameters", "steps", "tokens", "certificate", "state")],
                         ["E8", "5000", "2500", "30.0", "3000.0", "passed (exact)", "done"])
        near = lambda row, key, value: self.assertAlmostEqual(float(row[key]), value, places=12, msg=key)
        near(moe, "final_loss", 2.4)
        near(moe, "final_sd", math.sqrt(0.18))          # of 2.7 and 2.1
        near(moe, "final_difference", -0.8)             # -0.3 and -1.3: each against the control of its seed
        near(moe, "final_difference_sd", math.sqrt(0.5))
        near(moe, "start_loss", 4.05)
        near(moe, "start_difference", 0.05)
        near(dense, "final_loss", 3.2)
        # The control's 3000 tokens cost 30000 FLOPs: the arm's at 1500 tokens, half way between 3.4 and 2.9, and 3.6 and 3.1.
        near(moe, "at_flops", 30000)
        near(moe, "equal_flops_loss", (3.15 + 3.35) / 2)
        near(moe, "equal_flops_difference", 0.05)
        near(moe, "equal_tokens_loss", 2.4)
        # Below 3.0: seed 1 at 1000 + 1000 * 0.4 / 0.5; below 3.4: seed 2 at 1000 + 1000 * 0.2 / 0.5.
        near(moe, "tokens_to_beat_control", (1800 + 1400) / 2)
        self.assertEqual((moe["seeds_that_beat_control"], moe["dead_experts"], float(moe["fullest_over_mean"])), ("2", "2", 1.5))
        near(moe, "tokens_per_second", 1000)
        near(moe, "seconds", 3.0)
        self.assertEqual((dense["final_difference"], dense["certificate"], dense["tokens_to_beat_control"]), ("", "", ""))
        # ± 12.706 * sd / sqrt(2) = 6.35: two seeds so far apart tell nothing.
        self.assertIn("the best arm is E8 with a validation loss of 2.4000 ± 0.4243 (2), 0.8000 below the dense control (3.2000; "
                      "within the seeds' spread, 95 % interval ± 6.3530 from 2 seeds: no difference can be claimed)", page.text)
        self.assertIn("At equal training FLOPs (3.00·10⁴): the best arm is E8 with a validation loss of 3.2500", page.text)
        self.assertNotIn("agree to the last digit", page.text)
        self.assertIn("No arm beats the dense control. The best arm is read at 50% of its run, before its learning-rate schedule ends.", page.text)
        self.assertEqual(page.text.count("The best arm is read at"), 1, "not where the end is read")
        self.assertIn("has a validation loss of 4.0000 before any step", page.text)
        self.assertEqual(page.images, 5)
        self.assertNotIn("Missing or odd", page.text)
        for name in ("validation", "difference", "size", "training", "balance"):
            self.assertGreater((Path(directory) / f"report/{name}.png").stat().st_size, 20_000)
        self.assertEqual(len(lines), 16)

    def test_the_csv_has_the_doubles_of_the_metrics(self):
        losses = [0.1 + 0.2, 1 / 3, 4.8134420282052210, 2 / 7 * 1e-5]
        directory = self.sweep("exact", [self.arm("exact", "dense", [4.0, 3.0, 2.0, 1.0], control=True), self.arm("exact", "experts-8", losses, flops=1 / 7)])
        _, arms, lines = self.make(directory)
        told = [json.loads(line) for line in (Path(directory) / "experts-8/metrics.jsonl").read_text().splitlines()]
        told = [(line["step"], line["tokens"], line["tokens"] / 7, line["loss"]) for line in told if line["kind"] == "validation"]
        lines = [line for line in lines if line["arm"] == "experts-8"]
        self.assertEqual([(int(line["step"]), int(line["tokens"]), float(line["flops"]), float(line["loss"])) for line in lines],
                         [(s, t, t * (1 / 7), loss) for s, t, _, loss in told])
        self.assertEqual(float(arms["experts-8"]["final_loss"]), losses[-1])
        self.assertEqual(float(arms["experts-8"]["equal_tokens_loss"]), losses[-1])

    def test_interpolation(self):
        points = [(0, 4.0), (10, 3.0), (30, 2.0)]
        for x, y in ((0, 4.0), (5, 3.5), (10, 3.0), (15, 2.75), (30, 2.0), (31, None), (-1, None)):
            self.assertEqual(sweep_compare.interpolate(points, x), y)
        for bar, x in ((3.5, 5), (2.75, 15), (2.0, None), (1.0, None), (4.5, 0), (3.0, 10)):
            self.assertEqual(sweep_compare.first_below(points, bar), x)
        self.assertEqual(sweep_compare.mean_sd([]), (None, None))
        self.assertEqual(sweep_compare.mean_sd([2.0]), (2.0, None))
        self.assertEqual(sweep_compare.mean_sd([1.0, 3.0]), (2.0, math.sqrt(2)))
        self.assertAlmostEqual(sweep_compare.reach(1.0, 4), 3.182 / 2)
        self.assertIsNone(sweep_compare.is_clear(1.0, None, 1))
        self.assertTrue(sweep_compare.is_clear(-0.5, 0.01, 3))
        self.assertFalse(sweep_compare.is_clear(0.02, 0.01, 3))  # 4.303 / sqrt(3) = 2.48

    def test_equal_flops_and_arms_of_different_length(self):
        directory = self.sweep("flops", [
            self.arm("flops", "dense", [4.0, 3.5, 3.2, 3.0], control=True, steps=30),
            self.arm("flops", "experts-8", [4.0, 3.4, 2.9], flops=15.0, steps=20)], match="flops")
        sweeps, rows = self.compared(directory)
        self.assertEqual((sweeps.equal_tokens, sweeps.equal_flops), (2000, 30000.0))
        self.assertEqual(rows["experts-8"]["equal_flops_loss"], 2.9)
        self.assertEqual((rows["dense"]["equal_tokens_loss"], rows["dense"]["equal_flops_loss"]), (3.2, 3.0))
        self.assertEqual(rows["experts-8"]["state"], "done")
        self.assertAlmostEqual(rows["experts-8"]["equal_tokens_difference"], -0.3)
        # The steps that the sweep chose do not make another arm of another seed, and are no part of its name.
        directory = self.sweep("time", [
            self.arm("time", "dense_seed-1", [4.0, 3.0, 2.0, 1.0], control=True, steps=30),
            self.arm("time", "experts-8_seed-1", [4.0, 3.4, 2.9], steps=20),
            self.arm("time", "experts-8_seed-2", [4.0, 3.4], steps=10, seed=2)], match="time")
        sweeps, rows = self.compared(directory)
        self.assertEqual(list(rows), ["dense", "experts-8"])
        self.assertEqual((rows["experts-8"]["final_n"], rows["experts-8"]["steps"]), (2, 15))

    def test_a_sweep_under_way(self):
        """Half a last line, a resumed arm, one that crashed in a line, one that failed, one that can't run, one not begun, one that diverged."""
        log = self.folder / "busy/logs"
        log.mkdir(parents=True)
        (log / "failed.log").write_text("10:00:00 upcycle 0.1.0\nupcycle: an old error\n10:00:01 upcycle 0.1.0\n10:00:02 step 1/30\n"
                                        "upcycle: no such data: nowhere\n-----\nmpirun noise\n")
        (log / "crashed.log").write_text("upcycle: an old error\n10:00:01 upcycle 0.1.0\n")
        (log / "went-on.log").write_text("10:00:00 upcycle 0.1.0\nupcycle: an old error\n10:00:01 upcycle 0.1.0\n"
                                         "10:00:02 x: 5 parameters; 2 ranks (data 2) on A Fine CPU, tensors by MPI\n")
        steps = lambda first, last: [step(s) for s in range(first, last + 1)]
        whole = [start(0), validation(0, 4.0), *steps(1, 10), validation(10, 3.5), *steps(11, 20), validation(20, 3.3)]
        back = start(10) | {"kind": "rollback", "from": 15, "bad_steps": 1, "why": "a loss spike"}
        resumed = [*whole, start(10), *steps(11, 15), validation(15, 99.0), back, *steps(11, 20), validation(20, 3.1), *steps(21, 30), validation(30, 2.9)]
        crashed = [*whole, '{"kind":"step","step":21,"tok' + dump(start(10)), *steps(11, 15)]
        told = {"experts": lambda n: {"moe.experts": n}}
        directory = self.sweep("busy", [
            self.arm("busy", "dense", [4.0, 3.5, 3.2, 3.0], control=True),
            self.arm("busy", "resumed", None, lines=resumed, settings=told["experts"](2)),
            self.arm("busy", "running", None, lines=[*whole, dump(step(21))[:40]], end="", settings=told["experts"](3)),
            self.arm("busy", "crashed", None, lines=crashed, settings=told["experts"](4)),
            self.arm("busy", "failed", None, lines=whole[:3], settings=told["experts"](5)),
            self.arm("busy", "impossible", None, settings=told["experts"](6), cannot="6 experts over <4> ranks"),
            self.arm("busy", "later", None, settings=told["experts"](7)),
            self.arm("busy", "went-on", None, lines=[*whole, "{nonsense", *steps(21, 30), validation(30, None)], settings=told["experts"](8))])
        os.utime(Path(directory) / "running/metrics.jsonl")
        page, arms, lines = self.make(directory)
        state = {name: row["state"] for name, row in arms.items()}
        self.assertEqual(state, {"resumed": "done", "dense": "done", "went-on": "done", "running": "running at step 20 of 30",
                                 "crashed": "stopped at step 15 of 30", "failed": "failed at step 1 of 30", "impossible": "cannot run",
                                 "later": "not started"})
        losses = lambda name: [(line["step"], line["loss"]) for line in lines if line["arm"] == name]
        self.assertEqual(losses("resumed"), [("0", "4.0"), ("10", "3.5"), ("20", "3.1"), ("30", "2.9")])
        self.assertEqual(losses("crashed"), [("0", "4.0"), ("10", "3.5")], "what came after step 10 is to be done again")
        self.assertEqual(losses("went-on")[-1], ("30", ""))
        self.assertEqual((arms["went-on"]["final_loss"], arms["running"]["final_difference"]), ("", ""), "no end, nothing to compare")
        self.assertAlmostEqual(float(arms["resumed"]["final_difference"]), -0.1)
        self.assertEqual(float(arms["running"]["final_loss"]), 3.3)
        self.assertEqual((arms["dense"]["at_tokens"], arms["running"]["equal_tokens_loss"]), ("3000", ""), "only what is done is waited for")
        for words in ("E3: running at step 20 of 30.", "E4: stopped at step 15 of 30.", "E5: failed at step 1 of 30: no such data: nowhere.",
                      "E6: cannot run: 6 experts over <4> ranks.", "E7: not started.", "E8: its validation loss is not a number at step 30",
                      "E8: lines of its metrics.jsonl that can't be read were left out: 1.", "the best arm is E2", "Every arm has one seed", "one seed: it may be chance",
                      "A Fine CPU"):
            self.assertIn(words, page.text)
        self.assertNotIn("an old error", page.text)

    def test_labels_and_what_only_changes_together(self):
        arms = [self.arm("names", "dense", [4.0, 3.0], control=True)]
        for experts, std, lr, scaling in ((8, 0.02, 1.0, "exact"), (8, 1.4, 0.1, "exact"), (16, 1.4, 0.1, "cube_root")):
            settings = {"upcycle.router_logit_std": std, "optimizer.router_lr_scale": lr, "upcycle.scaling": scaling, "moe.experts": experts, "moe.top_k": 2}
            arms.append(self.arm("names", f"arm-{len(arms)}", [4.0, 3.0 - std], settings=settings))
        sweeps, _ = self.compared(self.sweep("names", arms))
        self.assertEqual({arm.name: arm.label for arm in sweeps.arms},
                         {"dense": "dense", "arm-1": "E8 router std 0.02 exact", "arm-2": "E8 router std 1.4 exact", "arm-3": "E16 router std 1.4 cube_root"})
        self.assertEqual(sweeps.facts["together"], ["optimizer.router_lr_scale goes with upcycle.router_logit_std: 1.0 with 0.02, 0.1 with 1.4"])
        self.assertEqual(sweeps.facts["constant"], {"train.steps": 30, "data.seed": 7})

    def test_of_unfinished_seeds_the_one_that_got_furthest_counts(self):
        directory = self.sweep("far", [self.arm("far", "dense", [4.0, 3.5, 3.2, 3.0], control=True), self.arm("far", "experts-8_seed-1", [4.0, 3.4, 3.1]),
                                       self.arm("far", "experts-8_seed-2", [4.0, 3.3], seed=2)])
        _, rows = self.compared(directory)
        self.assertEqual([rows["experts-8"][key] for key in ("final_loss", "final_n", "steps", "finished")], [3.1, 1, 20, False])
        self.assertEqual(rows["experts-8"]["state"], "1 of 2 stopped at step 20 of 30; 1 of 2 stopped at step 10 of 30")

    def test_nothing_is_done_yet(self):
        """All are compared where the slowest is; the control's end is not known, so nothing is said to beat it."""
        directory = self.sweep("young", [self.arm("young", "dense", [4.0, 3.5, 3.2], control=True), self.arm("young", "experts-8", [4.0, 3.4])])
        sweeps, rows = self.compared(directory)
        self.assertEqual(sweeps.equal_tokens, 1000)
        self.assertEqual((rows["dense"]["equal_tokens_loss"], rows["experts-8"]["equal_tokens_loss"]), (3.5, 3.4))
        self.assertAlmostEqual(rows["experts-8"]["equal_tokens_difference"], -0.1)
        self.assertEqual((rows["experts-8"]["final_difference"], rows["experts-8"]["tokens_to_beat_control"]), (None, None))
        self.make(directory)

    def test_without_a_control(self):
        directory = self.sweep("alone", [self.arm("alone", f"experts-{n}", [4.0, 3.5, 3.0, 3.0 - n / 100], settings={"moe.experts": n, "moe.top_k": 2})
                                         for n in (2, 4)])
        page, arms, _ = self.make(directory, out=self.folder / "elsewhere")
        self.assertFalse((Path(directory) / "report").exists())
        self.assertIn("There is no dense control", page.text)
        self.assertIn("the best arm is E4 with a validation loss of 2.9600 (1). Next is E2, 0.0200 behind (one seed: it may be chance).", page.text)
        self.assertEqual([row["final_difference"] for row in arms.values()], ["", ""])
        self.assertEqual(page.images, 4, "no differences to a control")

    def test_merged_sweeps(self):
        """Seeds of one arm from two machines; what both have ran the same counts once, what came out unlike counts twice and is said."""
        first = self.sweep("a", [self.arm("a", "dense_seed-1", [4.0, 3.5, 3.2, 3.0], control=True),
                                 self.arm("a", "experts-8_seed-1", [4.0, 3.4, 2.9, 2.7]),
                                 self.arm("a", "experts-4_seed-1", None, settings={"moe.experts": 4})])
        second = self.sweep("b", [self.arm("b", "dense_seed-1", [4.2, 3.5, 3.2, 3.1], control=True),
                                  self.arm("b", "experts-8_seed-2", [4.0, 3.5, 3.0, 2.6], seed=2),
                                  self.arm("b", "experts-4_seed-1", [4.0, 3.6, 3.1, 2.9], settings={"moe.experts": 4})])
        page, arms, lines = self.make(first, second, out=self.folder / "both")
        self.assertEqual({name: row["final_n"] for name, row in arms.items()}, {"experts-8": "2", "experts-4": "1", "dense": "2"})
        self.assertAlmostEqual(float(arms["experts-8"]["final_difference"]), ((2.7 - 3.0) + (2.6 - 3.1)) / 2, msg="each against its own control")
        self.assertEqual(arms["experts-4"]["state"], "done", "it ran in the second sweep")
        self.assertIn(f"dense_seed-1 was run 2 times, in {first}, {second}: each counts.", page.text)
        self.assertIn(f"validation loss of 4.0000 in {first}, 4.2000 in {second} before any step", page.text)
        self.assertEqual({line["sweep"] for line in lines}, {first, second})
        same = self.sweep("c", [self.arm("c", "dense_seed-1", [4.0, 3.5, 3.2, 3.0], control=True),
                                self.arm("c", "experts-8_seed-1", [4.0, 3.4, 2.9, 2.7])])
        _, rows = self.compared(first, same)
        self.assertEqual([rows[name]["final_n"] for name in ("dense", "experts-8")], [1, 1], "a copy is no second seed")

    def test_sweeps_that_do_not_belong_together(self):
        arms = lambda name, **more: [self.arm(name, "dense", [4.0, 3.0, 2.0, 1.0], control=True, **more), self.arm(name, "experts-8", [4.0, 3.0, 2.0, 1.0])]
        first = self.sweep("a", arms("a"))
        out = ["--out", self.folder / "out"]
        self.refused(first, self.sweep("b", arms("b"), base="other.toml"), *out, words=["base is base.toml in", "and other.toml in"])
        self.refused(first, self.sweep("c", arms("c", steps=10)), *out, words=["train.steps is 30 in", "and 10 in"])
        self.refused(first, self.sweep("d", arms("d"), match="time"), *out, words=["match is tokens in", "and time in"])
        self.refused(first, self.sweep("e", arms("e", parameters=7)), *out, words=["parameters of the control is 1000 in", "and 7 in"])
        self.refused(first, self.sweep("g", [self.arm("g", "experts-8", [4.0, 3.0, 2.0, 1.0])]), *out, words=["control is yes in", "and no in"])
        last = self.sweep("f", arms("f"))
        for sweep, lr in (("a", "0.001"), ("f", "0.002")):
            (self.folder / sweep / "dense.toml").write_text(f'[run]\nname = "{sweep}"  # x\n\n[optimizer]\nlr = {lr}   # base.toml:3\n')
        self.refused(first, last, *out, words=["optimizer.lr is 0.001 in", "and 0.002 in"])
        self.refused(first, first, *out, words=["named twice"])
        self.refused(first, last, words=["--out"])
        self.assertFalse((self.folder / "out").exists())

    def test_mistakes_are_named(self):
        self.refused(self.folder / "none", words=["none: no such directory"])
        self.refused(self.folder, words=["no sweep.json is in it", "sweep.directory"])
        (self.folder / "bad").mkdir()
        for content in ("", "{", "[]", '{"arms": []}', json.dumps({"sweep": "s", "base": "b", "match": "tokens", "ranks": 1, "arms": [{"name": "x"}]})):
            (self.folder / "bad/sweep.json").write_text(content)
            self.refused(self.folder / "bad", words=["bad/sweep.json is damaged", "move it away"])
        only = self.sweep("only", [self.arm("only", "dense", None, control=True), self.arm("only", "experts-8", None),
                                   self.arm("only", "experts-5", None, settings={"moe.experts": 5}, cannot="5 over 2")])
        self.refused(only, words=["no arm has a validation loss yet (2 not started, 1 cannot run)", "validate.every"])
        self.assertFalse((Path(only) / "report").exists())
        (self.folder / "file").write_text("x")
        self.refused(self.two_seeds(), "--out", self.folder / "file/below", words=["can't write", "file/below", "Not a directory"])
        self.refused(str(self.folder / "two"), "--out", self.folder / "file", words=["can't write", "file", "exists"])

    def test_many_long_arms_stay_small(self):
        """20 arms of 1000 steps in two axes: a page under 2 MB, a look of its own for each arm."""
        arms = [self.arm("large", "dense", [4 - i / 100 for i in range(26)], every=40, control=True, steps=1000)]
        for n, noise in ((n, noise) for n in (2, 4, 8, 16, 32) for noise in (0.0, 0.1, 0.2, 0.5)):
            losses = [4 - i / (100 - n) - noise / 10 for i in range(26)]
            arms.append(self.arm("large", f"experts-{n}_noise-{noise}", losses, every=40, steps=1000, parameters=1000 * n,
                                 settings={"moe.experts": n, "upcycle.noise": noise}))
        directory = self.sweep("large", arms)
        page, rows, _ = self.make(directory)
        self.assertEqual(page.images, 5)
        self.assertEqual(rows["experts-32_noise-0.5"]["label"], "E32 noise 0.5")
        sweeps, _ = self.compared(directory)
        looks, families = report_figures.looks_of(sweeps)
        self.assertEqual(sorted(map(len, families)), [5] * 4)
        self.assertEqual(len({(look["color"], str(look["linestyle"])) for look in looks.values()}), 21)
        self.assertLess((Path(directory) / "report/report.html").stat().st_size, 2_000_000)


if __name__ == "__main__":
    unittest.main()
