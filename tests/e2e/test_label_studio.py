"""The review with everything real: the command line, the server, people, and the page in a browser."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from label_studio_live import (
    digits_gallery,
    invitation_to,
    photographs_gallery,
    review_run,
    server_of_process,
    settings_for,
    sign_up,
    write_into_cache,
)
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from defuse_core.artifacts import Models
from defuse_core.config import dump_run_file
from defuse_core.errors import LabelsPending
from defuse_core.store import FolderStore
from services.cli import defuse
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.local_server import LocalServer
from services.labeling.simulate import AnnotatorAccount
from tests.conftest import MakeOnce, tiny, trained_run
from tests.waiting import WAIT_S, wait_until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-gpu-compositing",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,860",
)
WINDOWS = ((1366, 768), (1920, 1080))
PICTURES = os.environ.get("DEFUSE_TEST_PICTURES")  # a folder to keep screenshots in


@pytest.fixture(scope="module")
def server(make_once: MakeOnce) -> LocalServer:
    return server_of_process(make_once)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, server: LocalServer, tmp_path: Path) -> Callable[..., Result]:
    """The command line beside a local server: the one of the tests."""
    monkeypatch.delenv("LABEL_STUDIO_URL", raising=False)
    monkeypatch.setenv("DEFUSE_CACHE", str(tmp_path / "cache"))
    write_into_cache(tmp_path / "cache")

    def call(*words: str) -> Result:
        done = CliRunner().invoke(defuse, [*words, "--store", str(tmp_path / "runs")])
        if isinstance(done.exception, Exception):
            raise done.exception
        return done

    return call


@pytest.mark.usefixtures("no_figures")
def test_a_run_waits_for_people_and_goes_on_with_their_answers(
    cli: Callable[..., Result], tmp_path: Path, tiny_models: Models
) -> None:
    review = {"annotators": "label-studio", "answers_per_task": 3, "form": "scenario"}
    spec = tiny(review=review)
    (tmp_path / "digits.yaml").write_text(dump_run_file(spec))
    trained_run(FolderStore(tmp_path / "runs"), "digits", spec, tiny_models)
    words = ("run", str(tmp_path / "digits.yaml"), "--on", "local")
    with pytest.raises(LabelsPending, match="0 answers are in"):
        cli(*words)
    assert "0 of" in cli("review", "status", "digits").output
    assert "answered" in cli("label-studio", "simulate", "digits").output
    cli(*words)
    report = json.loads((tmp_path / "runs" / "digits" / "report.json").read_text())
    assert report["votes"]["annotators"] == 3
    assert report["votes"]["notes"]["form"] == "scenario"
    assert report["annotators"] == "reference models"  # people were simulated
    cli(
        "review",
        "set",
        "digits",
        "0",
        "--label",
        "8",
        "--reason",
        "seen on paper",
        "--author",
        "Ada",
        "--redo",
    )
    cli(*words)
    again = json.loads((tmp_path / "runs" / "digits" / "report.json").read_text())
    assert [override["author"] for override in again["overrides"]] == ["Ada"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The labelling page, as a person sees it."""

    def __init__(self, browser: webdriver.Chrome, server: LocalServer) -> None:
        self.browser, self.server = browser, server

    def log_in(self, account: AnnotatorAccount) -> None:
        self.browser.get(f"{self.server.address}/user/login/")
        self.find("input[name=email]").send_keys(account.email)
        self.find("input[name=password]").send_keys(account.password + Keys.RETURN)
        self.wait(lambda: "/user/login" not in self.browser.current_url)

    def open(self, project: int) -> None:
        self.browser.get(f"{self.server.address}/projects/{project}/data?labeling=1")
        self.find(".lsf-modal-ls button[aria-label='Close modal']").click()
        self.wait(lambda: not self.browser.find_elements(By.CSS_SELECTOR, ".lsf-modal-ls_visible"))

    def picture_is_painted(self) -> bool:
        script = "return [...document.querySelectorAll('.lsf-image img')].every(i => i.complete && i.naturalWidth > 0)"
        return bool(self.browser.find_elements(By.CSS_SELECTOR, ".lsf-image img")) and bool(
            self.browser.execute_script(script)
        )

    def press(self, key: str) -> None:
        webdriver.ActionChains(self.browser).send_keys(key).perform()

    def press_with_shift(self, key: str) -> None:
        webdriver.ActionChains(self.browser).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def width_of(self, selector: str) -> int:
        return int(self.find(selector).size["width"])

    def submit(self) -> None:
        self.find("button[aria-label='Submit current annotation']").click()

    def chosen(self) -> list[str]:
        ticked = self.browser.find_elements(By.CSS_SELECTOR, ".answers input:checked")
        return [str(box.get_attribute("name")) for box in ticked]

    def find(self, selector: str) -> WebElement:
        self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, selector))
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.browser, WAIT_S, 0.1).until(lambda _: condition())

    def keep(self, name: str) -> None:
        if PICTURES:
            self.browser.save_screenshot(f"{PICTURES}/{name}.png")


@pytest.fixture(scope="module")
def page(browser: webdriver.Chrome, server: LocalServer) -> Page:
    person = sign_up(server.address, invitation_to(server), f"reader-{secrets.token_hex(3)}@example.org")
    page = Page(browser, server)
    page.log_in(person)
    return page


def test_an_image_is_labelled_in_the_browser_with_one_key(
    page: Page, server: LocalServer, tmp_path: Path
) -> None:
    gallery = digits_gallery(images=2, size=32)
    annotators = LabelStudioAnnotators(
        review_run(tmp_path, gallery, answers_per_task=1), settings_for(server)
    )
    page.open(annotators.push(gallery).number)
    page.wait(page.picture_is_painted)
    page.press("8")
    page.wait(lambda: page.chosen() == ["8"])
    page.keep("image")
    assert not page.browser.find_elements(By.XPATH, "//button[contains(., 'Skip')]")
    page.submit()
    assert _first_answers(annotators, gallery, 1) == [(0, 0, 8)]
    page.wait(lambda: page.picture_is_painted() and not page.chosen())
    page.press("n")
    page.wait(lambda: page.chosen() == ["None of the above"])
    page.submit()
    assert _first_answers(annotators, gallery, 2) == [(0, 0, 8), (0, 1, -1)]


def test_a_scenario_is_labelled_in_the_browser_and_one_image_apart(
    page: Page, server: LocalServer, tmp_path: Path
) -> None:
    gallery = digits_gallery(images=10, size=32)
    run = review_run(tmp_path, gallery, answers_per_task=1, form="scenario", images=10)
    annotators = LabelStudioAnnotators(run, settings_for(server))
    page.open(annotators.push(gallery).number)
    page.wait(page.picture_is_painted)
    captions = [caption.text for caption in page.browser.find_elements(By.CSS_SELECTOR, ".cell h4")]
    assert captions == ["classifier: 3"] * 10
    lists = page.browser.find_elements(By.CSS_SELECTOR, ".cell button[data-testid=select-trigger]")
    script = "return getComputedStyle(arguments[0].querySelector('.truncate'), '::before').content"
    assert page.browser.execute_script(script, lists[3]) == '"same as page"'
    lists[3].click()
    page.find("[role=option]")
    for key in "58qwn":
        page.press(key)
    time.sleep(0.5)  # for a key that would change the page, or a picture
    assert page.chosen() == []
    page.keep("open-list")
    page.browser.find_elements(By.CSS_SELECTOR, "[role=option]")[3].click()
    page.press(Keys.ESCAPE)
    page.press_with_shift("8")
    page.wait(lambda: page.chosen() == ["8"])
    page.keep("scenario")
    page.submit()
    expected = [(0, image, 3 if image == 3 else 8) for image in range(10)]
    assert _first_answers(annotators, gallery, 10) == expected


@pytest.mark.parametrize("form, selector", [("image", ".picture"), ("scenario", ".cell")])
def test_pictures_grow_with_the_window(
    page: Page, server: LocalServer, tmp_path: Path, form: str, selector: str
) -> None:
    gallery = digits_gallery(labels=(8,), images={"image": 2, "scenario": 10}[form], size=32)
    run = review_run(tmp_path, gallery, answers_per_task=1, form=form)
    number = LabelStudioAnnotators(run, settings_for(server)).push(gallery).number
    page.browser.set_window_size(*WINDOWS[0])
    page.open(number)
    widths = []
    for window in WINDOWS:
        page.browser.set_window_size(*window)
        page.wait(lambda window=window: page.browser.execute_script("return window.innerWidth") == window[0])
        page.wait(page.picture_is_painted)
        page.keep(f"{form}-{window[0]}")
        widths.append(page.width_of(selector))
        below = page.browser.execute_script(
            f"return document.querySelector('{selector}').getBoundingClientRect().bottom"
        )
        assert below < page.browser.execute_script("return window.innerHeight") - 50  # the bar with Submit
    page.browser.set_window_size(1280, 860)
    small, large = {"image": (380, 650), "scenario": (150, 220)}[form]
    assert small <= widths[0] < widths[1] and widths[1] >= large


def test_the_picture_stays_beside_the_names_of_many_classes_and_a_long_name_stays_on_the_page(
    page: Page, server: LocalServer, tmp_path: Path
) -> None:
    gallery = replace(digits_gallery(images=1, size=32), classes=(*map(str, range(150)), "x" * 200))
    run = review_run(tmp_path, gallery, answers_per_task=1)
    page.browser.set_window_size(*WINDOWS[0])
    page.open(LabelStudioAnnotators(run, settings_for(server)).push(gallery).number)
    page.wait(page.picture_is_painted)
    last, long = page.browser.find_elements(By.CSS_SELECTOR, ".answers .lsf-choice")[:-3:-1]
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", last)
    page.keep("many-classes")
    script = (
        "const {top, right} = arguments[0].getBoundingClientRect(); return [top, right, window.innerWidth]"
    )
    picture = page.browser.execute_script(script, page.find(".picture"))
    name = page.browser.execute_script(script, long)
    page.browser.set_window_size(1280, 860)
    assert picture[0] >= 0 and name[1] <= name[2]


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_photographs_are_painted(page: Page, server: LocalServer, tmp_path: Path, form: str) -> None:
    gallery = photographs_gallery()
    run = review_run(tmp_path, gallery, answers_per_task=1, form=form)
    page.open(LabelStudioAnnotators(run, settings_for(server)).push(gallery).number)
    page.wait(page.picture_is_painted)
    page.keep(f"photographs-{form}")
    script = "return [...document.querySelectorAll('.lsf-image img')].map(i => i.naturalWidth)"
    assert page.browser.execute_script(script) == [224] * {"image": 1, "scenario": 3}[form]


def test_the_list_of_tasks_does_not_show_what_the_scenario_is(
    page: Page, server: LocalServer, tmp_path: Path
) -> None:
    gallery = digits_gallery(images=2, size=32)
    run = review_run(tmp_path, gallery, answers_per_task=1)
    number = LabelStudioAnnotators(run, settings_for(server)).push(gallery).number
    page.browser.get(f"{server.address}/projects/{number}/data")
    page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, ".dm-table img, [class*=table] img"))
    shown = page.browser.find_element(By.TAG_NAME, "body").text.lower()
    page.keep("list")
    assert "sample" not in shown and "scenario" not in shown and "s000" not in shown


def _first_answers(annotators: LabelStudioAnnotators, gallery, count: int) -> list[tuple[int, int, int]]:  # type: ignore[no-untyped-def]
    """Wait until `count` answers are there, and return them as (scenario, image, answer)."""
    wait_until(lambda: len(annotators.status(gallery).votes.answer) >= count)
    votes = annotators.status(gallery).votes
    return sorted(zip(votes.scenario.tolist(), votes.image.tolist(), votes.answer.tolist(), strict=True))
