"""The metrics page that merges the metrics of all nodes."""

from __future__ import annotations

from services.serving.metrics import merge_pages


def test_the_pages_of_several_nodes_become_one_page_with_one_header_per_metric():
    head = "# HELP ray_defuse_images_total x\n# TYPE ray_defuse_images_total counter\n"
    page = head + 'ray_defuse_images_total{n="%d"} 1.0\n# HELP other y\nother 2\n'
    assert merge_pages([page % 1, page % 2, ""]) == (
        "# HELP ray_defuse_images_total x\n# TYPE ray_defuse_images_total counter\n"
        'ray_defuse_images_total{n="1"} 1.0\nray_defuse_images_total{n="2"} 1.0\n'
    )
