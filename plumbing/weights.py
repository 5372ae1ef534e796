"""Checkpoints, ours and other people's: what is in them, how to read a file without running what is in it, turn its
names into ours, and tell the sizes of a model from the shapes of its tensors."""
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from cosmos import Config
from plumbing.errors import Refused, need
from plumbing.tokenizer import Tokenizer

# --- 1. Names of the released code and of open_clip ------------------------------------------------------------------

RENAMES = {          # our prefix -> theirs; the first match wins. Their text tower has no prefix.
    'visual.norm.': 'visual.ln_post.',
    'text.norm.': 'ln_final.',
    'text.proj': 'text_projection',
    'read_image.': 'visual.attn_cross_pool.',
    'read_text.': 'text_attn_cross_pool.',
    'image_map.': 'image_token_mapping.',
    'text_map.': 'text_token_mapping.',
    'visual.': 'visual.',
    'logit_scale': 'logit_scale',
    'distill_logit_scale': 'distill_logit_scale',
    'text.': '',
}


def rename(state_dict, table):
    """Every key with its first matching prefix replaced; values pass untouched."""
    renamed = {}
    for key, value in state_dict.items():
        prefix = next(prefix for prefix in table if key.startswith(prefix))
        renamed[table[prefix] + key.removeprefix(prefix)] = value
    return renamed


def to_openclip(state_dict):
    """Our names -> the released code's. open_clip loads them with strict=False, because it has no place for
    cross-attention, its maps or its scale."""
    return rename(state_dict, RENAMES)


def from_openclip(state_dict):
    """The released code's or open_clip's names -> ours, for load_state_dict(strict=True); open_clip's need a model with
    cross_heads=0."""
    return rename(state_dict, {theirs: ours for ours, theirs in RENAMES.items()})


def clean_names(state):
    """The state, without the prefixes that DistributedDataParallel and torch.compile put into its names."""
    names = [name.replace('_orig_mod.', '').removeprefix('module.') for name in state]
    return dict(zip(names, state.values()))


# --- 2. A file -> its tensors, and these -> a model ------------------------------------------------------------------

SAVE_A_STATE_DICT = ("load other people's weights with open_clip, and torch.save(model.state_dict(), FILE); "
                     'docs/questions.md shows it')
FETCH_OR_SAVE = f'fetch it again if it was fetched; {SAVE_A_STATE_DICT}'


def read_checkpoint(path, remedy=FETCH_OR_SAVE, mmap=False):
    """Tensors and plain values from a file. Nothing in it is executed; a file that needs that is Refused. remedy: what
    to do if it is torn. mmap: the tensors stay in the file, and take no memory until they are used."""
    need(Path(path).exists(), f'checkpoint {path} does not exist')
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise Refused(f'{path} may not be read ({error.strerror}); change its permissions') from None
    except Exception as error:          # torch raises many kinds, for torn files and for files of another kind
        first_line, _, _ = str(error).partition('\n')
        reason = f'it is torn, or of another kind; torch says: {first_line[:80]}'
        # torch names what it refused: "TorchScript", or "GLOBAL package.name"
        refused = re.search(r'TorchScript|(?<=GLOBAL )[\w.]+', str(error))
        if refused:
            reason = f'it holds {refused[0]}, which may run code'
        raise Refused(f'{path} is not a checkpoint that can be read ({reason}); {remedy}') from None
    need(isinstance(saved, dict), f'{path} holds no weights by name; save model.state_dict()')
    return saved


def load_weights(model, state, path):
    """Load strictly: every name and shape must fit, or it is Refused, with the first ones that do not. So are weights
    that are not finite, because scores could be computed with them."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip()[:200] for line in str(error).splitlines()]
        problems = '; '.join(lines[1:6])                    # line 0 is a heading
        raise Refused(f'{path} does not fit this model: {problems}') from None
    spoiled = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    need(not spoiled, f'{path} has values that are not finite, first in {spoiled[:1]}; give an earlier checkpoint')


# --- 3. Our checkpoints ----------------------------------------------------------------------------------------------

# Both files of a run hold `networks`: best.pt those with the best score on held-out shards, last.pt the latest ones.
#     best.pt  also   score, val (the fingerprint of those shards, and --caption-keys)
#     last.pt  also   optimizer, scaler, options, globals (GLOBALS), data (the fingerprint of --data), seconds
BEST = 'best.pt'
LAST = 'last.pt'
TENSORS = 'student', 'teacher', 'optimizer'


def networks(run, commit):
    """What evaluation needs of a train.Run."""
    state = {
        'config': asdict(run.train_set.config),
        'merges': run.train_set.tokenizer.merges,
        'step': run.step,
        'method': run.options.method,
        'commit': commit,
        'student': run.student.state_dict()}
    if run.teacher:
        state['teacher'] = run.teacher.model.state_dict()
    return state


def config_and_tokenizer(saved):
    """What a checkpoint of ours holds -> Config, Tokenizer."""
    config = Config(**saved['config'])
    return config, Tokenizer(saved['merges'], config.context_length)


def file_of(path):
    """A run's folder means its best.pt, or its last.pt if there is none. Any other path means itself."""
    path = Path(path)
    if path.is_dir():
        return path / BEST if (path / BEST).exists() else path / LAST
    return path


# --- 4. Which network a file holds -----------------------------------------------------------------------------------

def infer_config(state, quick_gelu):
    """Config of released or open_clip weights, from the shapes of their tensors, which do not tell how wide heads are.
    So these are taken to be 64 wide, as in open_clip's ViTs up to L, and cross-attention to have 8, as released."""
    vision_width, _, _, patch = state['visual.conv1.weight'].shape
    context_length, text_width = state['positional_embedding'].shape
    grid = math.isqrt(len(state['visual.positional_embedding']) - 1)  # one row is the class token's
    blocks = [name for name in state if name.endswith('.ln_1.weight')]  # of both towers
    vision_layers = sum(name.startswith('visual.') for name in blocks)
    return Config(embed_dim=state['text_projection'].shape[1],
                  image_size=grid * patch,
                  local_image_size=max(1, round(grid * 3 / 7)) * patch,  # the paper's 96 of 224
                  patch_size=patch,
                  vision_width=vision_width,
                  vision_layers=vision_layers,
                  vision_heads=max(1, vision_width // 64),
                  text_width=text_width,
                  text_layers=len(blocks) - vision_layers,
                  text_heads=max(1, text_width // 64),
                  context_length=context_length,
                  vocab_size=len(state['token_embedding.weight']),
                  cross_heads=8 if 'image_token_mapping.weight' in state else 0,
                  quick_gelu=quick_gelu)


class Origin(NamedTuple):
    """Which network of which file weights are, and if the file is ours, of which step and method. str() puts it into
    words. Towers and cross-attention are read as those of cosmos.COSMOS, even if the method has a student of its own."""
    network: str
    checkpoint: str
    step: object = None     # a number, 'unknown', or None for a file that is not ours
    method: str = None      # None if the file does not say

    def __str__(self):
        words = f'{self.network} of {self.checkpoint}'
        if self.step is not None:
            words += f', step {self.step}'
        if self.method:
            words += f' of --method {self.method}'
        return words


def read_network(path, weights, vocab, quick_gelu):
    """A file -> Origin, Config, tokenizer, and {our name: tensor}. The file is one of:

        ours        a checkpoint of train.py: {'student', 'teacher', 'config', 'merges', ...}
        released    {'student', 'teacher'}, under open_clip's names
        open_clip   the state dict of a ViT, perhaps under 'state_dict'

    weights: 'teacher' or 'student'; a file without a teacher gives the student. The last two kinds do not say which
    merges they use, so CLIP's are taken (vocab: their file, see Tokenizer.clip), nor which activation (quick_gelu).
    """
    saved = read_checkpoint(path)
    keys = [key for key in (weights, 'student', 'state_dict') if key in saved]
    key = keys[0] if keys else 'state dict'                             # the file itself
    found = saved[key] if keys else saved
    if isinstance(found, dict) and all(isinstance(name, str) for name in found):
        state = clean_names(found)
    else:
        state = {}                                                      # refused below
    if 'config' in saved and 'merges' in saved:         # ours
        config, tokenizer = config_and_tokenizer(saved)
        need(not vocab, f'{path} carries its vocabulary; omit --vocab')
        need(config.quick_gelu or not quick_gelu, f'{path} says itself which activation it has; omit --quick-gelu')
        origin = Origin(key, str(path), saved.get('step', 'unknown'), saved.get('method'))
        return origin, config, tokenizer, state
    # See infer_config for the width of heads. open_clip's ViTs that are wider than 1,024 have heads of another width.
    width = len(state.get('visual.class_embedding', ()))                # 0: there is none
    need(0 < width <= 1024 and width % 64 == 0 and {'text_projection', 'visual.conv1.weight'} <= state.keys(),
         f'{path} is neither a checkpoint of train.py, nor a released one, nor an open_clip ViT with heads 64 wide '
         f"(its keys: {', '.join(map(str, list(saved)[:5]))}); {SAVE_A_STATE_DICT}")
    config = infer_config(state, quick_gelu)
    tokenizer = Tokenizer.clip(vocab, config.context_length)
    need(tokenizer.vocab_size == config.vocab_size,
         f"{path} knows {config.vocab_size:,} ids, CLIP's vocabulary has {tokenizer.vocab_size:,}: "
         'it has other merges; if train.py trained it, take the checkpoint that train.py wrote')
    return Origin(key, str(path)), config, tokenizer, from_openclip(state)
