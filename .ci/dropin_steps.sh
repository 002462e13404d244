# Steps of .ci/run on the package in use: reference, examples, other packages, compilers.

reference() {
  NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir "$work/site"
  grep -c 'class="doc doc-object' "$work"/site/*/index.html
}

examples() {
  (
    cd "$work"
    python "$root/examples/accelerate_torchvision.py" --batch-size 4 --side 96 --steps 2
    python "$root/examples/lpips_loss.py" --side 64 --steps 20 --out lpips.png
    python "$root/examples/fused_layer.py" --steps 60
    python -c 'from PIL import Image; assert Image.open("lpips.png").size == (192, 64)'
  )
}

other_packages() {
  pytest tests/accelerate/test_accelerate_models.py tests/models/test_export.py tests/models/test_weights.py -rs | tee "$work/log"
  ! grep SKIPPED "$work/log" || return 1
}

compilers() { pytest -m slow tests/models/test_export.py; }
