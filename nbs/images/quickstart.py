"Makes the README's picture from a finished quickstart: python nbs/images/quickstart.py [outputs/moleflow/quickstart]"
import sys
from pathlib import Path

from PIL import Image

run = Path(sys.argv[1] if len(sys.argv) > 1 else 'outputs/moleflow/quickstart')
rows = [Image.open(p).convert('RGB') for p in sorted((run / 'figures').glob('maps-*.png'))]
if not rows: sys.exit(f'No score maps in {run}/figures: run `adflow run params/moleflow/quickstart.yaml` first.')
sheet = Image.new('RGB', (max(r.width for r in rows), sum(r.height + 6 for r in rows) - 6), 'white')
y = 0
for r in rows:
    sheet.paste(r, (0, y))
    y += r.height + 6
sheet.quantize(256, dither=Image.Dither.NONE).save(Path(__file__).with_suffix('.png'), optimize=True)
