//! What one interleaving is made of, drawn from its seed.
//!
//! `VARIATIONS` neighbouring seeds have the same program, which is what the guests do to which memory,
//! and differ in the deaths and in who waits where.

use vmd_core::internals::death::Point;
use vmd_core::internals::plan::Beside;

use crate::chance::Chance;
use crate::events::Stall;
use crate::image;

pub const GUESTS: usize = 3;
pub const PAGE: usize = 4096;
pub const VARIATIONS: u64 = 16;
/// Most pages of a world.
pub const PAGES_MAX: usize = 140;
/// Most of a small one, which most are.
const SMALL: usize = 24;
/// Least of a large one. The second filler gets a part of the plan from 64 pages on.
const LARGE: usize = 66;
const LARGE_PERCENT: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Read,
    Write,
    Remove,
}

#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub act: Act,
    pub page: usize,
    /// How many pages, for a removal.
    pub pages: usize,
    pub before: Stall,
}

/// Neighbouring pages of the guest, and the first page of the image that is in them.
#[derive(Clone, Copy)]
pub struct Span {
    pub pages: usize,
    pub image: usize,
}

/// How a page server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At its so-many-th passing of a point, from 0.
    At(Point, u32),
    /// From outside, at any moment.
    Kill,
    /// On purpose, at any moment.
    HandOver,
}

pub struct Plan {
    pub seed: u64,
    pub spans: Vec<Span>,
    pub beside: Beside,
    /// Pages that `beside` brings in.
    pub filled: Vec<bool>,
    pub ops: [Vec<Op>; GUESTS],
    /// Pages that are read in the end: those that anybody touches or fills, and one more.
    pub checked: Vec<usize>,
    /// Of each page server but the last one, which is stopped.
    pub ends: Vec<End>,
    /// The guests begin before there is anybody to serve them.
    pub guests_first: bool,
    /// At this point servers often wait for others to go on.
    pub slow: Point,
    /// So many installs of the first server are refused with EAGAIN.
    pub refused: u32,
}

/// Which pages the guests meet on.
enum Style {
    /// Each guest has its own.
    Own(usize),
    /// All on a few.
    Hot(Vec<usize>),
    Any,
}

impl Op {
    pub fn read(page: usize) -> Self {
        Self { act: Act::Read, page, pages: 1, before: Stall::No }
    }
}

impl Plan {
    pub fn draw(seed: u64) -> Self {
        let mut program = Chance::new(Chance::new(seed / VARIATIONS).draw());
        let large = program.percent(LARGE_PERCENT);
        let spans = draw_spans(&mut program, large);
        let pages = spans.iter().map(|span| span.pages).sum();
        let (beside, filled) = draw_beside(&mut program, &spans, pages, large);
        let ops = draw_ops(&mut program, &spans, pages);
        let checked = draw_checked(&mut program, &ops, &filled);
        let mut chance = Chance::new(!seed);
        let ends = draw_ends(&mut chance, beside != Beside::Nothing);
        let ops = ops.map(|ops| ops.into_iter().map(|op| Op { before: Stall::draw(&mut chance), ..op }).collect());
        Self {
            seed,
            spans,
            beside,
            filled,
            ops,
            checked,
            ends,
            guests_first: chance.percent(50),
            slow: Point::ALL[chance.below(Point::ALL.len())].1,
            refused: if chance.percent(5) { chance.between(1, 4) as u32 } else { 0 },
        }
    }

    pub fn pages(&self) -> usize {
        self.filled.len()
    }
}

fn draw_spans(chance: &mut Chance, large: bool) -> Vec<Span> {
    let (least, most) = if large { (LARGE, PAGES_MAX) } else { (6, SMALL) };
    let pages = chance.between(least, most);
    let sizes = if chance.percent(30) { vec![pages / 2, pages - pages / 2] } else { vec![pages] };
    let mut image = chance.below(image::PAGES - PAGES_MAX);
    let mut spans: Vec<Span> = Vec::new();
    for pages in sizes {
        spans.push(Span { pages, image });
        image += pages;
    }
    if spans.len() == 2 && chance.percent(50) {
        let [low, high] = [spans[0].image, spans[0].image + spans[1].pages];
        (spans[0].image, spans[1].image) = (high, low);
    }
    spans
}

fn draw_beside(chance: &mut Chance, spans: &[Span], pages: usize, large: bool) -> (Beside, Vec<bool>) {
    match chance.below(20) {
        _ if large => (Beside::Sequential(u64::MAX), vec![true; pages]),
        0..=11 => (Beside::Nothing, vec![false; pages]),
        12 => (Beside::Sequential(u64::MAX), vec![true; pages]),
        _ => {
            let plan = draw_replay(chance, pages);
            let offsets = plan.iter().map(|&page| (image_page(spans, page) * PAGE) as u64).collect();
            (Beside::Replay(offsets), (0..pages).map(|page| plan.contains(&page)).collect())
        }
    }
}

/// Runs of pages, none of them twice.
fn draw_replay(chance: &mut Chance, pages: usize) -> Vec<usize> {
    let mut plan: Vec<usize> = Vec::new();
    while plan.is_empty() || chance.percent(60) {
        let first = chance.below(pages);
        let run = first..pages.min(first + chance.between(1, 6));
        plan.extend(run.filter(|page| !plan.contains(page)).collect::<Vec<_>>());
    }
    plan
}

/// The page of the image that is in a page of the guest.
pub fn image_page(spans: &[Span], mut page: usize) -> usize {
    for span in spans {
        if page < span.pages {
            return span.image + page;
        }
        page -= span.pages;
    }
    panic!("no such page");
}

fn draw_ops(chance: &mut Chance, spans: &[Span], pages: usize) -> [Vec<Op>; GUESTS] {
    let style = match chance.below(3) {
        0 => Style::Own(pages / GUESTS),
        1 => Style::Hot((0..chance.between(1, 4)).map(|_| chance.below(pages)).collect()),
        _ => Style::Any,
    };
    std::array::from_fn(|guest| {
        let count = chance.between(2, 7);
        (0..count).map(|_| draw_op(chance, &style, guest, spans, pages)).collect()
    })
}

fn draw_op(chance: &mut Chance, style: &Style, guest: usize, spans: &[Span], pages: usize) -> Op {
    let (page, last) = match style {
        Style::Own(each) => (guest * each + chance.below(*each), (guest + 1) * each),
        Style::Hot(hot) => (chance.pick(hot), pages),
        Style::Any => (chance.below(pages), pages),
    };
    let first = spans[0].pages;
    let room = if page < first { first.min(last) - page } else { last - page }; // no removal goes over a gap
    let act = match chance.below(10) {
        0..=3 => Act::Read,
        4..=6 => Act::Write,
        _ => Act::Remove,
    };
    Op { act, page, pages: if act == Act::Remove { chance.between(1, room.min(4)) } else { 1 }, before: Stall::No }
}

fn draw_checked(chance: &mut Chance, ops: &[Vec<Op>; GUESTS], filled: &[bool]) -> Vec<usize> {
    let mut checked = filled.to_vec();
    ops.iter().flatten().flat_map(|op| op.page..op.page + op.pages).for_each(|page| checked[page] = true);
    checked[chance.below(filled.len())] = true;
    (0..checked.len()).filter(|&page| checked[page]).collect()
}

fn draw_ends(chance: &mut Chance, filling: bool) -> Vec<End> {
    const DEMAND: [Point; 6] = [Point::Read, Point::Apply, Point::Clear, Point::Intend, Point::Install, Point::Note];
    const FILL: [Point; 3] = [Point::FillIntend, Point::FillInstall, Point::FillNote];
    const ADOPT: [Point; 3] = [Point::AdoptApply, Point::AdoptWake, Point::Adopted];
    let count = [0, 0, 1, 1, 1, 1, 2, 2, 2, 3][chance.below(10)];
    let end = |number| {
        let after = [0, 0, 0, 1, 1, 2, 3, 5][chance.below(8)];
        match chance.below(10) {
            0 => End::HandOver,
            1 => End::Kill,
            2..=4 if number > 0 => End::At(chance.pick(&ADOPT), 0),
            5 | 6 if filling => End::At(chance.pick(&FILL), after),
            _ => End::At(chance.pick(&DEMAND), after),
        }
    };
    (0..count).map(end).collect()
}
