"""Errors at the command line: a bug shows its file and line, what a user can mend is one sentence. See data.Refused."""
import re
import subprocess
import sys

import pytest
import torch

import train
from tests.helpers import ROOT, dog_tar, pairs_tar, put, run

# file, what stands there once, what a student makes of it, the error that follows
BUGS = [
    # text_crops, image_crops, collate
    ('data', 'rng.randint(1, 5)', 'rng.randint(1, five)', 'NameError'),
    ('data', 'int(number * zoom)', 'int(number @ zoom)', 'TypeError'),
    ('data', 'ids.unbind(dim=1)', 'ids.unbind(dim=3)', 'IndexError'),
    # nce, CrossAttention
    ('cosmos', 'logits.view(V, B, U, N)', 'logits.view(V, B, N)', 'RuntimeError'),
    ('cosmos', 'self.ln_k(tokens)).tr', 'self.ln_k(tokens[..., 1:])).tr', 'RuntimeError'),
    # train_step, retrieval
    ('train', '(images, batch.texts)', '(images, batch.text)', 'AttributeError'),
    ('eval', "'image_to_text': ranks(", "'image_to_text': runks(", 'NameError')]
FILES = 'cosmos', 'data', 'eval', 'train'
TRAIN = ('train.py --preset tiny --steps 2 --batch 4 --workers 1 --eval-every 1 --device cpu --precision fp32 '
         '--out out --data ../dogs.tar --val ../dogs.tar')


def start(folder, command):
    """Start `python COMMAND` in a folder of the four files."""
    return subprocess.Popen([sys.executable, '-u', *command.split()], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def four_files(folder):
    for name in FILES:
        put(folder / f'{name}.py', (ROOT / f'{name}.py').read_bytes())
    return folder


def test_the_four_files_are_enough(tmp_path):
    """oracle: the exit status of training and of evaluation, where the four files are alone."""
    dog_tar(tmp_path / 'dogs.tar', 9)
    folder = four_files(tmp_path / 'alone')
    for command in TRAIN, 'eval.py retrieval out --shards ../dogs.tar':
        process = start(folder, command)
        output, _ = process.communicate()
        assert process.returncode == 0 and 'R@1' in output, output


def test_a_bug_shows_its_place(tmp_path):
    """oracle: the line that was changed is the last of ours in the traceback, and the error ends the output; from a
    loader's worker, too. An evaluation in mid-run shows it and lets training go on."""
    dog_tar(tmp_path / 'dogs.tar', 9)
    started = []
    for i, (file, right, wrong, error) in enumerate(BUGS):
        folder = four_files(tmp_path / str(i))
        before, after = (folder / f'{file}.py').read_text().split(right)    # it stands there once
        put(folder / f'{file}.py', before + wrong + after)
        line = 1 + before.count('\n')
        started.append([start(folder, TRAIN), folder, file, line, error])
    for process, folder, file, line, error in started:
        output, _ = process.communicate()
        assert process.returncode == 1, output
        frames = re.findall(r'\b(cosmos|data|eval|train)\.py", line (\d+)', output)
        assert frames[-1] == (file, str(line)), output
        assert re.search(rf'\n *{error}: .*\s*\Z', output), output
    assert output.count(f'eval.py", line {line}, in retrieval') == 3    # steps 0, 1, the end
    assert torch.load(folder / 'out/last.pt')['step'] == 2


REFUSED = {         # flags: what their sentence must say
    '--stepz 3': 'arguments: --stepz 3; see prog --help',
    '--preset huge': "--preset: invalid choice: 'huge'",
    '--method blip': "--method: invalid choice: 'blip'",
    '--lr banana': "--lr: invalid float value: 'banana'",
    '--steps 0': '--steps 0 is out of range; give 1 to inf',
    '--batch -4': '--batch -4 is out of range; give 1 to inf',
    '--batch 64': '--batch 64 .* 20 pairs; lower --batch',
    '--data absent': "'absent' does not exist",
    '--data empty': "'empty' .* no .tar file",
    '--data broken.tar': 'broken.tar:1.png .*its image is no image',
    '--data empty/page': 'page: no readable tar of images',
    '--batch 9 --accum 2': '--batch 9 cannot be cut into 2 parts',
    '--data wordless.tar': 'wordless.tar.*no usable caption .*--caption-keys',
    '--vocab page': 'page .* not CLIP.* --vocab learn',
    '--resume none.pt': 'none.pt does not exist',
    '--resume page': 'page is no checkpoint',
    '--resume other.pt': 'other.pt holds no run to resume',
    '--init other.pt': 'other.pt is neither ours, .*its keys: weights.* extras.weights import other.pt'}


@pytest.mark.parametrize('line', REFUSED)
def test_what_a_user_can_mend_is_one_sentence(monkeypatch, tmp_path, line):
    """oracle: the rule: status 1, one line with the value, the place and the remedy; nothing is written."""
    monkeypatch.chdir(tmp_path)
    dog_tar('dogs.tar', 20)
    dog_tar('broken.tar', 2, broken=[0, 1])
    pairs_tar('wordless.tar', [{'number': 5}])
    put('page', '<html>')
    put('empty/page')
    torch.save({'weights': torch.zeros(1)}, 'other.pt')
    flags = f'--data dogs.tar --preset micro --batch 4 --device cpu --out out {line}'
    assert re.fullmatch(f'error: .*{REFUSED[line]}.*', run(train, *flags.split()))
    assert not (tmp_path / 'out').exists()
