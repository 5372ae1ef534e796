"""A picture of cross-attention: which patches a text attends to (C^I), and which words an image attends to (C^T).

    python -m extras.attend CKPT --image a.jpg --text "a red star" "a small blue ring" --out attention.png

The picture has a row for each text. It shows the image, then how much C^I reads each patch when the text is the query,
then how much C^T reads each word when the image is the query.
"""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from eval import execute
from plumbing.errors import command, need
from plumbing.files import replacing
from plumbing.images import load_image
from plumbing.options import Parser, add_checkpoint

# --- 1. Weights ------------------------------------------------------------------------------------------------------

def word_weights(tokenizer, caption, weights):
    """weights (T,) of C^T over the ids of a caption -> [(word, weight)], as shares of the largest weight.

    The weights of a word's pieces are summed. Start, end and padding are keys, too, but they are not words, so they are
    left out before scaling.
    """
    sums = []
    first = 1                                                       # position 0 is the start
    for word in tokenizer.split(caption):
        end = first + len(tokenizer.word_ids(word))
        if end < len(weights):      # a long caption was cut off, and its last position holds the end token
            sums.append((word, weights[first:end].sum().item()))
        first = end
    most = max((weight for _, weight in sums), default=1)
    return [(word, weight / most) for word, weight in sums]


@torch.no_grad()
def attention(model, tokenizer, preprocess, image, caption):
    """-> map (h, w) of C^I with the caption as query, scaled to [0, 1]; [(word, weight)] of C^T with the image as
    query, as shares of the largest weight."""
    device = model.logit_scale.device
    ids = tokenizer([caption]).to(device)
    pixels = preprocess(image)[None].to(device)
    patches, weights = model.attention(pixels, ids)                 # (1, P), (1, T)
    side = math.isqrt(patches.shape[1])
    grid = patches.view(side, side).cpu().numpy()
    heat = (grid - grid.min()) / max(np.ptp(grid), 1e-12)
    return heat, word_weights(tokenizer, caption, weights[0])


# --- 2. The picture, and the command ---------------------------------------------------------------------------------

TILE = 224                  # side of an image, in pixels
LINE = 18                   # height of a word
MARGIN = 8


def attention_picture(model, tokenizer, preprocess, image, captions, path):
    """Draw the PNG that the head of this file describes."""
    need(model.has_cross_attention, 'this model has no cross-attention, so there is nothing to draw; '
         'take a released model, or a run of --method cosmos or across')
    maps = [attention(model, tokenizer, preprocess, image, caption) for caption in captions]
    most = max(len(words) for _, words in maps)
    step = MARGIN + max(TILE, LINE * most)
    width = 3 * TILE + 200    # image, map, bars, and room for a word that is wider than its bar
    canvas = Image.new('RGB', (width, len(maps) * step + 30), 'white')      # the legend is below
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(12)       # Pillow's own: other letters than ASCII become boxes
    view = ImageOps.fit(image.convert('RGB'), (TILE, TILE))     # what `preprocess` shows the model
    left = 2 * TILE + 3 * MARGIN
    top = MARGIN
    for grid, words in maps:
        grey = Image.fromarray(np.uint8(255 * grid)).resize(view.size, Image.BILINEAR)
        heat = ImageOps.colorize(grey, '#00204d', '#ffea46', '#7c7b78')  # colours that the colour-blind can tell apart
        canvas.paste(view, (MARGIN, top))
        canvas.paste(Image.blend(view, heat, 0.6), (TILE + 2 * MARGIN, top))
        y = top
        for word, weight in words:
            draw.rectangle((left, y, left + TILE * weight, y + LINE - 3), '#ffea46')
            draw.text((left + 4, y), word, 'black', font)
            y += LINE
        top += step
    legend = ('image | patches that the text attends to (C^I): blue least, yellow most | '
              'words that the image attends to (C^T): full bar most')
    draw.text((MARGIN, top), legend, 'black', font)
    with replacing(path) as partial:
        canvas.save(partial, 'PNG')


def run_attend(args, model, tokenizer, preprocess):
    need(args.out.lower().endswith('.png'), f'--out {args.out} is no PNG; name a file that ends in .png')
    attention_picture(model, tokenizer, preprocess, load_image(args.image), args.text, args.out)
    return {'picture': args.out}


def main():
    parser = Parser(prog='python -m extras.attend', epilog=__doc__,
                    usage='%(prog)s CKPT --image FILE --text TEXT ... [options]')
    add_checkpoint(parser, workers=False)
    parser.set_defaults(command='attend', function=run_attend)
    add = parser.add_argument
    add('--image', required=True, help='the image to draw')
    add('--text', required=True, nargs='+', help='one or more captions')
    add('--out', default='runs/attention.png', help='the picture (default: %(default)s)')
    execute(parser.parse_args())


if __name__ == '__main__':
    command(main)
