#!/usr/bin/env python3
"""What upcycle train does with data: supervised fine-tuning on masked tokens, packed documents, blends, an epoch limit.
Usage: data_modes.py UPCYCLE [unittest arguments]"""
import json
import os
import subprocess
import sys
import unittest
from pathlib import Path

import numpy as np
import tiny_run
from tiny_run import CONFIG, MOE, SEQUENCE, VOCAB, TrainCase, checkpoint, steps_of, write_mask, write_tokens

PREPROCESS = Path(__file__).resolve().parents[2] / "tools/preprocess"
STEADY = '[optimizer]\nschedule = "constant"\nlr = 1e-3\n'


def conversations(number, seed=5):
    """Documents of a question, of the lower words, and its answer, of the upper ones; and which of their tokens are the answer's."""
    random = np.random.default_rng(seed)
    tokens, masks = [], []
    for _ in range(number):
        question, answer = random.integers(3, 30), random.integers(2, 20)
        tokens.append(np.concatenate([random.integers(0, VOCAB // 2, question), random.integers(VOCAB // 2, VOCAB, answer)]))
        masks.append(np.concatenate([np.zeros(question), np.ones(answer)]))
    return tokens, masks


class DataCase(TrainCase):
    def setUp(self):
        super().setUp()
        self.tokens, self.masks = conversations(80)

    def assert_same_losses(self, a, b, bound=1e-6):
        a, b = steps_of(a), steps_of(b)
        self.assertEqual([line["step"] for line in a], [line["step"] for line in b])
        for one, other in zip(a, b):
            self.assertEqual(one.get("learned_tokens"), other.get("learned_tokens"))
            self.assertLess(abs(one["loss"] - other["loss"]) / one["loss"], bound * (1 if one["step"] <= 5 else 10))


class FineTuning(DataCase):
    DATA = 'train = [[3.0, "chat"], [1.0, "plain"]]\nvalidation = [[1.0, "held_out"]]\ndocuments = "packed"'
    VALIDATED = STEADY + "[validate]\nevery = 3\nbatches = 2\n"

    def setUp(self):
        super().setUp()
        write_tokens(self.root / "chat", self.tokens)
        write_mask(self.root / "chat", self.masks)
        write_tokens(self.root / "plain", [np.arange(50) % VOCAB] * 9)
        tokens, masks = conversations(30, seed=6)
        write_tokens(self.root / "held_out", tokens)
        write_mask(self.root / "held_out", masks)

    def test_stopped_and_resumed_on_other_layouts(self):
        path, straight = self.run_file("straight", MOE + self.VALIDATED, steps=9, data=self.DATA)
        self.assertIn(" samples of chat, learned where its loss mask says so\n", self.upcycle("plan", path))
        said = self.upcycle("train", path)
        self.assertIn("chat: learned where its loss mask says so", said)
        self.assertNotIn("plain: learned", said)
        learned = [line["learned_tokens"] for line in steps_of(straight)]
        self.assertEqual(len(learned), 9)
        self.assertGreater(len(set(learned)), 3)
        self.assertTrue(all(8 * SEQUENCE * 0.25 < n < 8 * SEQUENCE for n in learned), learned)   # a quarter of the samples is plain

        # Stopped and resumed on the same layout: bit for bit the same.
        path, stopped = self.run_file("stopped", MOE + self.VALIDATED, data=self.DATA)
        self.upcycle("train", path, "--set", "train.steps=4")
        self.upcycle("train", path, "--set", "train.steps=9")
        self.assertEqual([line["loss"] for line in steps_of(stopped)], [line["loss"] for line in steps_of(straight)])
        self.assert_same_files(checkpoint(straight, 9), checkpoint(stopped, 9))

        path, moved = self.run_file("moved", MOE + self.VALIDATED, data=self.DATA)
        for steps, ranks, layout in ((2, 2, ["context=2"]), (4, 2, ["pipeline=2", "virtual_stages=1"]), (6, 2, ["tensor=2", "expert=2"]),
                                     (8, 4, ["context=2", "expert=4"]), (9, 1, [])):
            self.upcycle("train", path, "--set", f"train.steps={steps}", *[f"parallel.{axis}" for axis in layout], ranks=ranks)
        self.assert_same_losses(straight, moved)
        validations = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"validation"' in line]
                       for run in (straight, moved)]
        self.assertAlmostEqual(validations[0][0], validations[1][0], delta=1e-6 * validations[0][0])
        self.assertAlmostEqual(validations[0][-1], validations[1][-1], delta=1e-5 * validations[0][-1])

    def test_only_answers_are_learned(self):
        """Answers are of the upper half of the vocabulary: a model that learns them alone forgets that there is a lower one."""
        extra = '[optimizer]\nlr = 1e-2\nschedule = "constant"\n[validate]\nevery = 40\nbatches = 2\n'
        last = {}
        for name in ("answers", "all"):
            path, run = self.run_file(name, extra, steps=40, data='train = [[1.0, "chat"]]\nvalidation = [[1.0, "questions"]]')
            tokens = [np.where(mask > 0, 0, document) for document, mask in zip(self.tokens, self.masks)]
            write_tokens(self.root / "questions", tokens)
            if name == "all":
                (self.root / "chat.mask.idx").unlink()
                (self.root / "chat.mask.bin").unlink()
            self.upcycle("train", path)
            last[name] = json.loads([line for line in (run / "metrics.jsonl").read_text().splitlines() if '"validation"' in line][-1])["loss"]
            self.assertEqual("learned_tokens" in steps_of(run)[0], name == "answers")
        self.assertGreater(last["answers"], last["all"] + 1.0, last)

    def test_from_conversations(self):
        """What tools/preprocess --chat writes: one epoch learns all that the masks name, but for what it leaves out in front."""
        import tokenizers_for_tests
        template = ("{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
                    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
        tokenizer = tokenizers_for_tests.qwen(self.root / "tokenizer", template)
        chats = [[("user", f"What is {i} and {i}?"), ("assistant", f"It is {2 * i}.")] for i in range(60)]
        (self.root / "chats.jsonl").write_text("".join(
            json.dumps({"messages": [{"role": role, "content": content} for role, content in chat]}) + "\n" for chat in chats))
        made = subprocess.run([sys.executable, PREPROCESS, "chats.jsonl", "--chat", "--tokenizer", tokenizer, "--output", "sft"],
                              cwd=self.root, capture_output=True, text=True)
        self.assertEqual(made.returncode, 0, made.stdout + made.stderr)
        mask = np.fromfile(self.root / "sft.mask.bin", np.uint8)
        self.assertTrue(0.1 < mask.mean() < 0.6, mask.mean())
        samples = (len(mask) - 1) // SEQUENCE
        architecture = self.root / "random.json"
        architecture.write_text(json.dumps(CONFIG | {"vocab_size": 512}))
        path, run = self.run_file("run", MOE, steps=1, global_batch=samples, source=f'architecture = "{architecture}"',
                                  data='train = [[1.0, "sft"]]\nsplit = [1, 0, 0]\ndocuments = "packed"\nepochs = 1')
        self.upcycle("train", path)
        learned = steps_of(run)[0]["learned_tokens"]
        self.assertTrue(mask.sum() - SEQUENCE - 1 < learned <= mask.sum(), (learned, mask.sum()))
        self.refused("train", path, "--set", "train.steps=2", "--accept-changes", words=["2 passes", "At most train.steps = 1"])

    def refused_mask(self, *words, ranks=1):
        path, _ = self.run_file("run", MOE + self.VALIDATED, data=self.DATA)
        self.refused("train", path, words=words, ranks=ranks)

    def test_masks_that_are_wrong(self):
        chat = self.root / "chat"
        longer = [np.ones(len(mask) + (i == 33)) for i, mask in enumerate(self.masks)]
        write_mask(chat, longer)
        self.refused_mask(f"chat.mask.idx: document 33 has {len(longer[33])} tokens, but {len(self.tokens[33])} in chat.idx", ranks=2)
        write_mask(chat, self.masks[:-1])
        self.refused_mask("chat.mask.idx: 79 documents, but 80 in chat.idx; document 79 is the first that the mask lacks")
        write_tokens(f"{chat}.mask", self.masks)   # of int32
        self.refused_mask("chat.mask.idx: dtype code 4, but a mask has one uint8")
        masks = [mask.copy() for mask in self.masks]
        masks[20][4] = 7
        write_mask(chat, masks)
        self.refused_mask("chat.mask.bin: document 20, position 4: value 7, but a mask says 1 (learned) or 0 (only read)", ranks=2)
        write_mask(chat, [0 * mask for mask in self.masks])
        self.refused_mask("chat.mask.bin: the train share of split [99990, 8, 2] has no token that is learned", ranks=2)
        write_mask(chat, self.masks)
        (self.root / "chat.mask.bin").write_bytes((self.root / "chat.mask.bin").read_bytes()[:-1])
        self.refused_mask("chat.mask.bin: ", "it was cut off")
        write_mask(chat, self.masks)
        (self.root / "chat.mask.idx").unlink()
        self.refused_mask("chat.mask.bin is there, but not its index")
        write_mask(chat, self.masks)
        write_mask(self.root / "held_out", [np.zeros(len(mask)) for mask in conversations(30, seed=6)[1]])
        self.refused_mask("held_out.mask.bin: the validation share", "has no token that is learned")


class Packed(DataCase):
    def test_over_context_ranks(self):
        """The same losses as on one rank, and others than without borders."""
        write_tokens(self.root / "text", self.tokens)
        runs = {}
        for name, borders, ranks, parallel in (("one", "packed", 1, ""), ("context", "packed", 2, "context = 2"),
                                               ("four", "packed", 4, "context = 2\nexpert = 4"), ("open", "concatenated", 1, "")):
            path, runs[name] = self.run_file(name, MOE + STEADY + f"[parallel]\n{parallel}\n",
                                             data=f'train = [[1.0, "text"]]\ndocuments = "{borders}"')
            self.upcycle("train", path, ranks=ranks)
        self.assert_same_losses(runs["one"], runs["context"])
        self.assert_same_losses(runs["one"], runs["four"])
        for one, other in zip(steps_of(runs["one"]), steps_of(runs["open"])):
            self.assertGreater(abs(one["loss"] - other["loss"]) / one["loss"], 1e-4)


class Epochs(DataCase):
    def setUp(self):
        super().setUp()
        write_tokens(self.root / "small", [np.arange(4 * SEQUENCE + 1) % VOCAB])    # 4 samples
        write_tokens(self.root / "large", [np.arange(40 * SEQUENCE + 1) % VOCAB])   # 40
        self.data = 'train = [[7.0, "large"], [1.0, "small"]]\nsplit = [1, 0, 0]\nepochs = 2'   # 1 of 8 samples of a step is small's

    def test_no_run_passes_data_more_often(self):
        path, run = self.run_file("run", MOE, steps=12, data=self.data)
        words = ["data.epochs = 2, but train.steps = 12 of train.global_batch = 8 samples pass over data more often",
                 "large has 40 samples of train.sequence = 16; the run draws 84, 2.1 passes",
                 "small has 4 samples of train.sequence = 16; the run draws 12, 3 passes", "At most train.steps = 8 keeps to it"]
        self.refused("train", path, words=words, ranks=2)
        self.refused("plan", path, words=words)
        self.upcycle("train", path, "--set", "train.steps=8")
        self.refused("train", path, "--set", "train.steps=9", "--accept-changes",
                     words=["the run draws 9, 2.25 passes", "At most train.steps = 8"])   # resumed
        self.upcycle("train", path, "--set", "train.steps=9", "data.epochs=2.25", "--accept-changes")
        self.assertEqual([line["step"] for line in steps_of(run)], list(range(1, 10)))

    def test_plan_says_how_often(self):
        path, _ = self.run_file("run", MOE, steps=8, data=self.data)
        plan = json.loads(self.upcycle("plan", path, "--json"))
        self.assertEqual([(part["prefix"], part["samples"], part["passes"]) for part in plan["data"]], [("large", 40, 1.4), ("small", 4, 2.0)])
        said = self.upcycle("plan", path)
        self.assertIn("1.4 passes over the 40 samples of large", said)
        self.assertIn("2 passes over the 4 samples of small", said)
        (self.root / "small.bin").unlink()
        self.assertEqual(json.loads(self.upcycle("plan", path, "--json"))["data"], [])
        self.assertNotIn("passes over", self.upcycle("plan", path))


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
