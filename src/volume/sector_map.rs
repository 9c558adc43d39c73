//! What an epoch says of each sector, and who may write to it: the atomics of the local path.
//!
//! One word describes 32 sectors (16 KiB): `written` in its low half, `zeroed` in its high half, a bit a sector; one
//! more bit a block says "zeros from here down". A sector is what the first of these says: written, zeroed, block bit,
//! the layer below. **A word never becomes empty again**, so that any mix of old and new words and bits, in memory, in
//! a flush's copy or on disk, is a state between before and after.
//!
//! Owns: the meaning of words and bits, the order of the steps that change them, entering and freezing an epoch.
//! Does not own: where the words lie (an epoch's files).

use crate::disk::{MAP_PAGE_WORDS, SharedMap};
use crate::geometry::{
    BlockIndex, ByteRange, SECTOR_BYTES, SECTORS_PER_WORD, WORDS_PER_BLOCK, block_count, len_of,
};
use crate::mutant::{self, Mutant};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An atomic word: the real one, or a model checker's.
pub trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn fetch_or(&self, value: u64, order: Ordering) -> u64;
    fn fetch_add(&self, value: u64, order: Ordering) -> u64;
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64;
    fn swap(&self, value: u64, order: Ordering) -> u64;
    fn compare_exchange(&self, old: u64, new: u64, ok: Ordering, fail: Ordering) -> Result<u64, u64>;
    /// A `SeqCst` fence.
    fn fence();
}

/// Implements [`Word`] by an atomic's own methods.
macro_rules! word {
    ($atomic:ty, $fence:path) => {
        impl Word for $atomic {
            fn load(&self, order: Ordering) -> u64 {
                self.load(order)
            }
            fn store(&self, value: u64, order: Ordering) {
                self.store(value, order);
            }
            fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
                self.fetch_or(value, order)
            }
            fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
                self.fetch_add(value, order)
            }
            fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
                self.fetch_sub(value, order)
            }
            fn swap(&self, value: u64, order: Ordering) -> u64 {
                self.swap(value, order)
            }
            fn compare_exchange(&self, old: u64, new: u64, ok: Ordering, fail: Ordering) -> Result<u64, u64> {
                self.compare_exchange(old, new, ok, fail)
            }
            fn fence() {
                $fence(Ordering::SeqCst);
            }
        }
    };
}

word!(AtomicU64, std::sync::atomic::fence);

/// Enters the epoch `number` as a writer, if it still is the active one. Both sides have a `SeqCst` fence between what
/// they write and what they read: with anything less the one who freezes can read a count of zero while a writer, having
/// read the old number, is inside.
pub fn enter<W: Word>(active: &W, number: u64, writers: &W) -> bool {
    writers.fetch_add(1, Ordering::SeqCst);
    W::fence();
    mutant::on(Mutant::NoSecondLook) || active.load(Ordering::SeqCst) == number
}

/// Leaves an epoch, also after an [`enter`] that said no. `true`: the caller was the last one in a frozen epoch and must
/// wake whoever waits for that.
#[must_use]
pub fn leave<W: Word>(active: &W, number: u64, writers: &W) -> bool {
    let last = writers.fetch_sub(1, Ordering::SeqCst) == 1;
    W::fence();
    last && active.load(Ordering::SeqCst) != number
}

/// Makes `next` the active epoch. The old one is frozen once [`is_drained`] says so.
pub fn freeze<W: Word>(active: &W, next: u64) {
    active.store(next, Ordering::SeqCst);
    W::fence();
}

/// Whether no writer is inside.
pub fn is_drained<W: Word>(writers: &W) -> bool {
    writers.load(Ordering::SeqCst) == 0
}

/// `word` after a write to the sectors of `mask`.
pub fn written(word: u64, mask: u32) -> u64 {
    (word | u64::from(mask)) & !(u64::from(mask) << 32)
}

/// `word` after the sectors of `mask` became zero.
pub fn zeroed(word: u64, mask: u32) -> u64 {
    (word | u64::from(mask) << 32) & !u64::from(mask)
}

/// `word` after its whole block became zero, which the block bit says too: a word that says something goes on saying it.
pub fn block_zeroed(word: u64) -> u64 {
    if word == 0 || mutant::on(Mutant::DiscardEmptiesWords) { 0 } else { u64::from(u32::MAX) << 32 }
}

/// Changes a word, then marks its page changed: marked first, a flush could clear the mark and copy the old word.
pub fn update<W: Word>(word: &W, changed: &W, changed_bit: u64, change: impl Fn(u64) -> u64) {
    // All SeqCst: whoever sees the mark still there is before the flush that clears it, and so is the word it saw.
    let mut old = word.load(Ordering::SeqCst);
    loop {
        let new = change(old);
        if new == old {
            break;
        }
        match word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => break,
            Err(now) => old = now,
        }
    }
    // Marked even if the word was so already: whoever set it may not have marked it yet, and this write is about to be
    // counted.
    if changed.load(Ordering::SeqCst) & changed_bit == 0 {
        changed.fetch_or(changed_bit, Ordering::SeqCst);
    }
}

/// Takes the marks of 64 pages: clears them, and only after that may their words be copied.
pub fn take_changed<W: Word>(changed: &W) -> u64 {
    if changed.load(Ordering::SeqCst) == 0 { 0 } else { changed.swap(0, Ordering::SeqCst) }
}

/// Where words, block bits and data lie, in pages of 4 KiB. Page 0 is a header; page numbers are the same in the live
/// map's file and in front of the epoch file's data, so that a flush copies page for page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapLayout {
    /// Size of the volume that it is for.
    pub size_bytes: u64,
    word_pages: usize,
    bit_pages: usize,
}

/// Bytes in a map page.
pub const MAP_PAGE_BYTES: u64 = 4096;

const _: () = assert!(MAP_PAGE_WORDS as u64 * 8 == MAP_PAGE_BYTES, "a map page is a page of words");

impl MapLayout {
    /// The layout for a volume of that size.
    pub fn of(size_bytes: u64) -> Self {
        let blocks = block_count(size_bytes);
        let words = len_of(blocks * WORDS_PER_BLOCK);
        let bits = len_of(blocks.div_ceil(64));
        Self {
            size_bytes,
            word_pages: words.div_ceil(MAP_PAGE_WORDS),
            bit_pages: bits.div_ceil(MAP_PAGE_WORDS),
        }
    }

    /// Pages in all, the header's included.
    pub fn pages(self) -> usize {
        1 + self.word_pages + self.bit_pages
    }

    /// Words in all, the header's included.
    pub fn words(self) -> usize {
        self.pages() * MAP_PAGE_WORDS
    }

    /// Where byte 0 of the volume lies in the epoch file: behind the map, aligned to a block.
    pub fn data_start_bytes(self) -> u64 {
        (self.pages() as u64 * MAP_PAGE_BYTES).next_multiple_of(crate::geometry::BLOCK_BYTES)
    }

    fn word_of(self, block: BlockIndex) -> usize {
        MAP_PAGE_WORDS + len_of(block.0 * WORDS_PER_BLOCK)
    }

    fn first_bit_word(self) -> usize {
        (1 + self.word_pages) * MAP_PAGE_WORDS
    }
}

/// What an epoch says of a run of sectors within one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Says {
    /// Sectors whose bytes are in the epoch's file.
    pub written: u32,
    /// Sectors that are zero.
    pub zeroed: u32,
}

/// The sector map of one epoch: words in a live map, and what is kept beside them in memory.
pub struct SectorMap {
    live: Arc<dyn SharedMap>,
    layout: MapLayout,
    /// A bit a page that was ever allocated: the others are empty, and are not looked at.
    touched: Box<[AtomicU64]>,
    /// A bit a page that was changed since a flush copied it.
    changed: Box<[AtomicU64]>,
    touched_pages: AtomicU64,
}

impl SectorMap {
    /// A map over `live`, of which `allocated` pages may say something. All of them count as changed.
    pub fn new(live: Arc<dyn SharedMap>, layout: MapLayout, allocated: &[usize]) -> Self {
        let bitmap = || (0..layout.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>();
        let map =
            Self { live, layout, touched: bitmap(), changed: bitmap(), touched_pages: AtomicU64::new(0) };
        for &page in allocated.iter().filter(|&&page| page > 0 && page < layout.pages()) {
            map.touched[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
            map.touched_pages.fetch_add(1, Ordering::Relaxed);
            if !mutant::on(Mutant::CleanAfterRestart) {
                map.changed[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
        map
    }

    /// Its layout.
    pub fn layout(&self) -> MapLayout {
        self.layout
    }

    /// Memory of the live map, in pages of 4 KiB.
    pub fn touched_pages(&self) -> u64 {
        self.touched_pages.load(Ordering::Relaxed)
    }

    /// Whether it says anything at all of any sector.
    pub fn is_empty(&self) -> bool {
        self.pages_touched().all(|page| self.page(page).iter().all(|word| word.load(Ordering::Acquire) == 0))
    }

    /// Makes the map pages of `range` safe to touch. Never waits for a disk on tmpfs.
    ///
    /// # Errors
    /// `StorageFull`: nothing was changed.
    pub fn allocate(&self, range: ByteRange, what: Touch) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let blocks = range.blocks();
        if what != Touch::BlockBits {
            let first = self.layout.word_of(BlockIndex(blocks.start)) / MAP_PAGE_WORDS;
            let last = (self.layout.word_of(BlockIndex(blocks.end)) - 1) / MAP_PAGE_WORDS;
            (first..=last).try_for_each(|page| self.touch(page))?;
        }
        if what != Touch::Words {
            let first = (self.layout.first_bit_word() + len_of(blocks.start / 64)) / MAP_PAGE_WORDS;
            let last = (self.layout.first_bit_word() + len_of((blocks.end - 1) / 64)) / MAP_PAGE_WORDS;
            (first..=last).try_for_each(|page| self.touch(page))?;
        }
        Ok(())
    }

    /// Notes that the bytes of `range`, whole sectors, are in the file. Its word pages must be allocated.
    pub fn mark_written(&self, range: ByteRange) {
        for (index, mask) in self.word_masks(range) {
            self.update(index, |word| written(word, mask));
        }
    }

    /// Notes that the sectors of `range`, all in one block and not all of it, are zero. Its word pages must be allocated.
    pub fn mark_zeroed(&self, range: ByteRange) {
        for (index, mask) in self.word_masks(range) {
            self.update(index, |word| zeroed(word, mask));
        }
    }

    /// Notes that whole blocks are zero. The pages of their bits must be allocated.
    pub fn mark_blocks_zeroed(&self, blocks: std::ops::Range<u64>) {
        for (index, mask) in self.bit_masks(blocks.clone()) {
            self.update(index, |word| word | mask);
        }
        self.each_word_page(blocks, |words, changed, bit| {
            for word in words {
                if word.load(Ordering::Acquire) != 0 {
                    update(word, changed, bit, block_zeroed);
                }
            }
        });
    }

    /// Whether it says anything of any sector of `range`; never `false` by mistake.
    pub fn has_record(&self, range: ByteRange) -> bool {
        let count = block_count(self.layout.size_bytes);
        let blocks = range.blocks().start.min(count)..range.blocks().end.min(count);
        let bit = |(index, mask): (usize, u64)| self.look(index) & mask != 0;
        let mut any = false;
        self.each_word_page(blocks.clone(), |words, _, _| {
            any |= words.iter().any(|word| word.load(Ordering::Acquire) != 0);
        });
        any || self.bit_masks(blocks).any(bit)
    }

    /// What it says of the 32 sectors around sector `sector`; sectors beyond its size are in neither mask.
    pub fn says(&self, sector: u64) -> Says {
        let block = BlockIndex::of(sector * SECTOR_BYTES);
        if sector * SECTOR_BYTES >= self.layout.size_bytes {
            return Says { written: 0, zeroed: 0 };
        }
        let word = self.look(MAP_PAGE_WORDS + len_of(sector / SECTORS_PER_WORD));
        let bits = self.look(self.layout.first_bit_word() + len_of(block.0 / 64));
        let (low, high) = (low_half(word), low_half(word >> 32));
        let zeroed = if bits >> (block.0 % 64) & 1 == 1 { !low } else { high & !low };
        Says { written: low, zeroed }
    }

    /// Indexes of the blocks of which it says something: words first, then runs of block bits, in no order, perhaps
    /// a block in both.
    pub fn recorded_blocks(&self) -> (Vec<u64>, Vec<std::ops::Range<u64>>) {
        let (mut blocks, mut runs) = (Vec::new(), Vec::<std::ops::Range<u64>>::new());
        for page in self.pages_touched() {
            let first = page * MAP_PAGE_WORDS;
            if first < self.layout.first_bit_word() {
                for (at, words) in self.page(page).chunks_exact(len_of(WORDS_PER_BLOCK)).enumerate() {
                    if words.iter().any(|word| word.load(Ordering::Acquire) != 0) {
                        blocks.push((first - MAP_PAGE_WORDS) as u64 / WORDS_PER_BLOCK + at as u64);
                    }
                }
            } else {
                let first_block = (first - self.layout.first_bit_word()) as u64 * 64;
                for (at, word) in self.page(page).iter().enumerate() {
                    push_runs(&mut runs, first_block + at as u64 * 64, word.load(Ordering::Acquire));
                }
            }
        }
        (blocks, runs)
    }

    /// Takes the marks of all pages changed since the last call, and only then copies them. The copies are in page order.
    pub fn take_changed_pages(&self) -> Vec<(usize, Vec<u64>)> {
        let pages = self.take_changed_marks();
        pages.into_iter().map(|page| (page, self.copy_page(page))).collect()
    }

    /// The marks alone, cleared.
    pub fn take_changed_marks(&self) -> Vec<usize> {
        let mut pages = Vec::new();
        for (at, marks) in self.changed.iter().enumerate() {
            let mut taken = take_changed(marks);
            while taken != 0 {
                pages.push(at * 64 + taken.trailing_zeros() as usize);
                taken &= taken - 1;
            }
        }
        pages
    }

    /// What a page says now.
    pub fn copy_page(&self, page: usize) -> Vec<u64> {
        self.page(page).iter().map(|word| word.load(Ordering::SeqCst)).collect()
    }

    /// Marks pages changed again, whose copies did not reach the file.
    pub fn mark_changed_again(&self, pages: impl IntoIterator<Item = usize>) {
        for page in pages {
            self.changed[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Stretches whose bytes are in the file, in order.
    pub fn written_ranges(&self) -> Vec<ByteRange> {
        let mut ranges = Vec::<ByteRange>::new();
        let mut blocks = self.recorded_blocks().0;
        blocks.sort_unstable();
        for block in blocks {
            for word in 0..WORDS_PER_BLOCK {
                let sector = block * crate::geometry::SECTORS_PER_BLOCK + word * SECTORS_PER_WORD;
                let mut mask = self.says(sector).written;
                while mask != 0 {
                    let skip = u64::from(mask.trailing_zeros());
                    let count = u64::from((mask >> skip).trailing_ones());
                    let range = ByteRange::new((sector + skip) * SECTOR_BYTES, count * SECTOR_BYTES);
                    match ranges.last_mut() {
                        Some(last) if last.end() == range.start() => {
                            *last = ByteRange::new(last.start(), last.len() + range.len());
                        }
                        _ => ranges.push(range),
                    }
                    mask = if skip + count >= 32 { 0 } else { mask & !((1 << (skip + count)) - 1) };
                }
            }
        }
        ranges
    }

    fn touch(&self, page: usize) -> io::Result<()> {
        let bit = 1 << (page % 64);
        if self.touched[page / 64].load(Ordering::Acquire) & bit == 0 {
            self.live.allocate(page)?;
            if self.touched[page / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
                self.touched_pages.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn is_touched(&self, page: usize) -> bool {
        self.touched[page / 64].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    fn pages_touched(&self) -> impl Iterator<Item = usize> {
        self.touched.iter().enumerate().flat_map(|(at, bits)| {
            let mut bits = bits.load(Ordering::Acquire);
            std::iter::from_fn(move || {
                (bits != 0).then(|| {
                    let bit = bits.trailing_zeros() as usize;
                    bits &= bits - 1;
                    at * 64 + bit
                })
            })
        })
    }

    fn page(&self, page: usize) -> &[AtomicU64] {
        &self.live.words()[page * MAP_PAGE_WORDS..(page + 1) * MAP_PAGE_WORDS]
    }

    fn look(&self, index: usize) -> u64 {
        if self.is_touched(index / MAP_PAGE_WORDS) {
            self.live.words()[index].load(Ordering::Acquire)
        } else {
            0
        }
    }

    fn update(&self, index: usize, change: impl Fn(u64) -> u64) {
        let page = index / MAP_PAGE_WORDS;
        update(&self.live.words()[index], &self.changed[page / 64], 1 << (page % 64), change);
    }

    /// Calls `visit` with the words of `blocks`, page by page, of the pages that were ever touched.
    fn each_word_page(
        &self,
        blocks: std::ops::Range<u64>,
        mut visit: impl FnMut(&[AtomicU64], &AtomicU64, u64),
    ) {
        if blocks.is_empty() {
            return;
        }
        let first = self.layout.word_of(BlockIndex(blocks.start));
        let end = self.layout.word_of(BlockIndex(blocks.end));
        let mut page = first / MAP_PAGE_WORDS;
        while page * MAP_PAGE_WORDS < end {
            let marks = self.touched[page / 64].load(Ordering::Acquire) >> (page % 64);
            if marks == 0 {
                page = (page / 64 + 1) * 64;
                continue;
            }
            page += marks.trailing_zeros() as usize;
            let from = first.max(page * MAP_PAGE_WORDS);
            let to = end.min((page + 1) * MAP_PAGE_WORDS);
            if from < to {
                visit(&self.live.words()[from..to], &self.changed[page / 64], 1 << (page % 64));
            }
            page += 1;
        }
    }

    /// Index and sector mask of each word of `range`.
    fn word_masks(&self, range: ByteRange) -> impl Iterator<Item = (usize, u32)> + use<> {
        let (first, end) = (range.start() / SECTOR_BYTES, range.end().div_ceil(SECTOR_BYTES));
        let mut sector = first;
        std::iter::from_fn(move || {
            (sector < end).then(|| {
                let from = sector % SECTORS_PER_WORD;
                let count = (SECTORS_PER_WORD - from).min(end - sector);
                let mask = (u32::MAX >> (32 - count)) << from;
                let index = MAP_PAGE_WORDS + len_of(sector / SECTORS_PER_WORD);
                sector += count;
                (index, mask)
            })
        })
    }

    /// Index and bit mask of each word of block bits.
    fn bit_masks(&self, blocks: std::ops::Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
        let first_bit_word = self.layout.first_bit_word();
        let mut block = blocks.start;
        std::iter::from_fn(move || {
            (block < blocks.end).then(|| {
                let from = block % 64;
                let count = (64 - from).min(blocks.end - block);
                let mask = (u64::MAX >> (64 - count)) << from;
                let index = first_bit_word + len_of(block / 64);
                block += count;
                (index, mask)
            })
        })
    }
}

/// What a change will touch of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touch {
    /// Words of sectors.
    Words,
    /// Block bits.
    BlockBits,
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
fn low_half(word: u64) -> u32 {
    word as u32
}

fn push_runs(runs: &mut Vec<std::ops::Range<u64>>, first_block: u64, mut bits: u64) {
    while bits != 0 {
        let skip = u64::from(bits.trailing_zeros());
        let count = u64::from((bits >> skip).trailing_ones());
        let run = first_block + skip..first_block + skip + count;
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
        bits = if skip + count >= 64 { 0 } else { bits & !((1 << (skip + count)) - 1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use proptest::prelude::*;

    /// A live map in plain memory.
    struct Memory(Box<[AtomicU64]>, Mutex<std::collections::BTreeSet<usize>>);

    impl SharedMap for Memory {
        fn words(&self) -> &[AtomicU64] {
            &self.0
        }
        fn allocate(&self, page: usize) -> io::Result<()> {
            self.1.lock().insert(page);
            Ok(())
        }
        fn allocated_pages(&self) -> io::Result<Vec<usize>> {
            Ok(self.1.lock().iter().copied().collect())
        }
    }

    fn map_of(size_bytes: u64) -> (Arc<Memory>, SectorMap) {
        let layout = MapLayout::of(size_bytes);
        let words = (0..layout.words()).map(|_| AtomicU64::new(0)).collect();
        let memory = Arc::new(Memory(words, Mutex::default()));
        (memory.clone(), SectorMap::new(memory, layout, &[]))
    }

    #[derive(Clone, Debug)]
    enum Change {
        Write(u64, u64),
        Zero(u64, u64),
        Blocks(u64, u64),
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let change = prop_oneof![
            (0u64..1024, 1u64..600).prop_map(|(at, len)| Change::Write(at, len)),
            (0u64..1024, 1u64..200).prop_map(|(at, len)| Change::Zero(at, len)),
            (0u64..4, 1u64..4).prop_map(|(at, len)| Change::Blocks(at, len)),
        ];
        proptest::collection::vec(change, 0..20)
    }

    proptest! {
        #[test]
        fn map_says_what_was_done_last(changes in changes()) {
            const SECTORS: u64 = 1024;
            let (_, map) = map_of(SECTORS * SECTOR_BYTES);
            let mut model = vec![None; 1024];
            let set = |model: &mut Vec<Option<bool>>, from: u64, len: u64, what| {
                for sector in from..(from + len).min(SECTORS) {
                    model[len_of(sector)] = Some(what);
                }
            };
            let bytes = |from: u64, len: u64| {
                ByteRange::new(from * SECTOR_BYTES, len.min(SECTORS - from) * SECTOR_BYTES)
            };
            for change in changes {
                match change {
                    Change::Write(from, len) => {
                        map.allocate(bytes(from, len), Touch::Words).unwrap();
                        map.mark_written(bytes(from, len));
                        set(&mut model, from, len, true);
                    }
                    Change::Zero(from, len) => {
                        for (_, piece) in bytes(from, len).split_at_blocks() {
                            map.allocate(piece, Touch::Words).unwrap();
                            map.mark_zeroed(piece);
                        }
                        set(&mut model, from, len, false);
                    }
                    Change::Blocks(from, len) => {
                        let blocks = from..(from + len).min(4);
                        map.allocate(bytes(from * 256, (blocks.end - from) * 256), Touch::BlockBits).unwrap();
                        map.mark_blocks_zeroed(blocks);
                        set(&mut model, from * 256, len * 256, false);
                    }
                }
            }
            for (sector, expected) in (0u64..).zip(&model) {
                let says = map.says(sector);
                let bit = sector % SECTORS_PER_WORD;
                let found = match (says.written >> bit & 1, says.zeroed >> bit & 1) {
                    (1, 0) => Some(true),
                    (0, 1) => Some(false),
                    (0, 0) => None,
                    _ => panic!("both"),
                };
                prop_assert_eq!(found, *expected, "sector {}", sector);
            }
            let written: Vec<u64> = map
                .written_ranges()
                .into_iter()
                .flat_map(|range| range.start() / SECTOR_BYTES..range.end() / SECTOR_BYTES)
                .collect();
            let expected: Vec<u64> = (0..SECTORS).filter(|&s| model[len_of(s)] == Some(true)).collect();
            prop_assert_eq!(written, expected);
            prop_assert_eq!(map.is_empty(), model.iter().all(Option::is_none));
            let (blocks, runs) = map.recorded_blocks();
            for block in 0..4u64 {
                let any = model[len_of(block * 256)..len_of(block * 256 + 256)].iter().any(Option::is_some);
                let listed = blocks.contains(&block) || runs.iter().any(|run| run.contains(&block));
                prop_assert_eq!(listed, any, "block {}", block);
            }
        }

        /// L19: whatever of a whole-block discard's words and bits reached the disk, each sector reads as before or after.
        #[test]
        fn l19_any_part_of_a_discard_is_a_state_between(before: [u64; 8], arrived: u16) {
            let before = before.map(|word| written(word, 0));
            let reads = |words: [u64; 8], bit: bool, sector: usize| {
                let word = words[sector / 32];
                let at = sector % 32;
                if word >> at & 1 == 1 { 'w' } else if word >> (32 + at) & 1 == 1 || bit { 'z' } else { 'b' }
            };
            let clean = before.map(|word| word & !(word << 32));
            let after = clean.map(block_zeroed);
            let mixed: [u64; 8] = std::array::from_fn(|at| if arrived >> at & 1 == 1 { after[at] } else { clean[at] });
            let bit = arrived >> 8 & 1 == 1;
            for sector in 0..256 {
                let (old, new, now) =
                    (reads(clean, false, sector), reads(after, true, sector), reads(mixed, bit, sector));
                prop_assert!(now == old || now == new, "sector {} reads {} of {} and {}", sector, now, old, new);
            }
        }
    }

    /// L26: what was never written to is not looked at, so that nothing is allocated.
    #[test]
    fn l26_reading_and_discarding_an_empty_terabyte_touches_next_to_nothing() {
        let (memory, map) = map_of(1 << 40);
        for sector in (0..(1u64 << 40) / SECTOR_BYTES).step_by(1 << 20) {
            assert_eq!(map.says(sector), Says { written: 0, zeroed: 0 });
        }
        assert!(!map.has_record(ByteRange::new(0, 1 << 40)));
        assert!(memory.1.lock().is_empty());
        map.allocate(ByteRange::new(0, 1 << 40), Touch::BlockBits).unwrap();
        map.mark_blocks_zeroed(0..1 << 23);
        assert_eq!(memory.1.lock().len(), 256, "a bit a block: 1 MiB");
        assert!(map.says(1 << 30).zeroed == u32::MAX);
    }

    /// The model checker's atomics: the very functions above run on them, in every order that the memory model allows.
    mod loomed {
        use super::super::*;
        #[cfg(feature = "mutants")]
        use crate::mutant;
        use loom::sync::Arc;
        use loom::sync::atomic::AtomicU64 as LoomU64;
        use loom::thread;

        word!(LoomU64, loom::sync::atomic::fence);

        /// L6: a cutter that saw the count at zero has every write that was acknowledged in the old epoch.
        fn cut_against_a_writer() {
            let active = Arc::new(LoomU64::new(1));
            let writers = Arc::new(LoomU64::new(0));
            let bytes = Arc::new(LoomU64::new(0));
            let writer = {
                let (active, writers, bytes) = (active.clone(), writers.clone(), bytes.clone());
                thread::spawn(move || {
                    if enter(&*active, 1, &*writers) {
                        bytes.store(7, Ordering::Relaxed);
                        let _wake = leave(&*active, 1, &*writers);
                        true
                    } else {
                        let _wake = leave(&*active, 1, &*writers);
                        false
                    }
                })
            };
            freeze(&*active, 2);
            let uploaded = is_drained(&*writers).then(|| bytes.load(Ordering::Relaxed));
            let wrote = writer.join().unwrap();
            if let Some(uploaded) = uploaded
                && wrote
            {
                assert_eq!(uploaded, 7, "an acknowledged write was not uploaded");
            }
        }

        #[test]
        fn l6_cut_never_misses_a_writer_inside() {
            loom::model(cut_against_a_writer);
        }

        #[cfg(feature = "mutants")]
        #[test]
        fn l6_without_the_second_look_a_write_is_missed() {
            let missed = std::thread::spawn(|| {
                mutant::set(Some(mutant::Mutant::NoSecondLook));
                std::panic::catch_unwind(|| loom::model(cut_against_a_writer)).is_err()
            });
            assert!(missed.join().unwrap());
        }

        /// The last one out of a frozen epoch wakes the cutter: nobody waits for a wake-up that went by.
        #[test]
        fn l6_whoever_waits_for_the_last_writer_is_woken() {
            loom::model(|| {
                let active = Arc::new(LoomU64::new(1));
                let writers = Arc::new(LoomU64::new(0));
                let writer = {
                    let (active, writers) = (active.clone(), writers.clone());
                    thread::spawn(move || {
                        let _inside = enter(&*active, 1, &*writers);
                        leave(&*active, 1, &*writers)
                    })
                };
                freeze(&*active, 2);
                let drained = is_drained(&*writers);
                let woken = writer.join().unwrap();
                assert!(drained || woken, "the cutter sleeps for ever");
            });
        }

        /// L25: a flush that counted a write has its word in its copy, or an earlier flush had.
        #[test]
        fn l25_counted_write_is_in_the_copy() {
            let mut model = loom::model::Builder::new();
            // Three threads with a loop each: every schedule with up to two preemptions.
            model.preemption_bound = Some(2);
            model.check(|| {
                let word = Arc::new(LoomU64::new(0));
                let changed = Arc::new(LoomU64::new(0));
                let count = Arc::new(LoomU64::new(0));
                let write = |mask: u32| {
                    let (word, changed, count) = (word.clone(), changed.clone(), count.clone());
                    thread::spawn(move || {
                        update(&*word, &*changed, 1, |old| written(old, mask));
                        count.fetch_add(1, Ordering::SeqCst);
                    })
                };
                // Both write the same sector: the second finds its bit set, perhaps before its mark.
                let (one, two) = (write(1), write(1));
                let mut flushed = 0;
                for _ in 0..2 {
                    let counted = count.load(Ordering::SeqCst);
                    if take_changed(&*changed) != 0 {
                        flushed = word.load(Ordering::SeqCst);
                    }
                    assert!(counted == 0 || flushed & 1 == 1, "a flushed write is not in the flushed map");
                }
                one.join().unwrap();
                two.join().unwrap();
            });
        }
    }
}
