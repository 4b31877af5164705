meta:
  id: stb
  title: Language model with weights of few bits (.stb), format version 2
  file-extension: stb
  xref:
    mime: application/vnd.stb
  license: CC0-1.0
  ks-version: '0.10'
  endian: le
  bit-endian: le

doc: |
  One file holds one language model, or a collection of tensors. The head has a directory of sections. DATA
  holds the payloads of the tensors, TENSORS their names, shapes and encodings, META keys with values.

  This is a description of the structure only. It computes no checksum, it does not decode weights, and it does
  not know the rules for model files. It checks what `valid` can express, and Kaitai checks the fields of an
  instance only when that instance is read. So a file that parses need not conform, and the first error found
  need not be the rule that the specification wants to be named. The pages of the specification are normative,
  this file is not.

  "Container", "Metadata" and "Encodings" in the texts below are pages of the specification.
doc-ref: Container §2, §3

seq:
  - id: head
    type: head
    size: 4096
    doc: The first 4096 bytes. A shorter file breaks STB-R-001.
    doc-ref: Container §3.1

instances:
  find_data:
    pos: 64
    type: find_section(section_type::data)
    doc: The directory up to the entry of DATA. The end of `entries` is that entry.
  find_tensors:
    pos: 64
    type: find_section(section_type::tensors)
    doc: The directory up to the entry of TENSORS.
  find_meta:
    pos: 64
    type: find_section(section_type::meta)
    doc: The directory up to the entry of META.
  tensors:
    value: find_tensors.entries.last.body.as<tensors_section>
    doc: The content of TENSORS.
    doc-ref: Container §3.3
  metadata:
    value: find_meta.entries.last.body.as<meta_section>
    doc: The content of META.
    doc-ref: Metadata §1
  after_sections:
    pos: head.sections.last.end
    size-eos: true
    valid:
      expr: _.length == 0
    doc: Nothing. The last section ends where the file ends (STB-R-012).
  after_payloads:
    pos: find_data.entries.last.offset + tensors.entries.last.end
    size: find_data.entries.last.length - tensors.entries.last.end
    valid:
      expr: _.length == 0
    doc: Nothing. The last payload ends where DATA ends (STB-R-035).

types:
  zeros:
    doc: Bytes that have no meaning. All are zero, so that nothing is left of them when zeros are cut off.
    doc-ref: Container §3.5
    seq:
      - id: other_than_zero
        size-eos: true
        pad-right: 0
        valid:
          expr: _.length == 0

  head:
    doc-ref: Container §3.1
    seq:
      - id: magic
        contents: [0x8f, STB, 0x0d, 0x0a, 0x1a, 0x0a]
        doc: STB-R-002.
      - id: min_reader
        type: u2
        valid:
          min: 1
          max: 2
        doc: |
          Oldest format version whose readers can read the file. It is 1 or more (STB-R-005), and this
          description is one of version 2 (STB-R-003).
      - id: written
        type: u2
        valid:
          min: min_reader
        doc: Format version of the writer, not below min_reader (STB-R-005). It may be above 2.
      - id: header_size
        type: u4
        valid: 64
        doc: STB-R-005.
      - id: file_size
        type: u8
        valid:
          expr: _ == _root._io.size
        doc: Length of the file (STB-R-008).
      - id: section_count
        type: u4
        valid:
          min: 1
          max: 64
        doc: STB-R-007.
      - id: section_entry_size
        type: u4
        valid: 48
        doc: STB-R-005.
      - id: flags
        type: u8
        valid: 0
        doc: STB-R-006.
      - id: reserved
        size: 24
        type: zeros
        doc: STB-R-006.
      - id: sections
        type: 'section_entry(_index == 0 ? 4096 : sections[_index - 1].next_start)'
        repeat: expr
        repeat-expr: section_count
        doc: |
          The directory, in file order. DATA, TENSORS and META are there once each (STB-R-013); that none is
          there twice is not checked here.
        doc-ref: Container §3.2
      - id: padding
        size: 4024 - 48 * section_count
        type: zeros
        doc: STB-R-006.
      - id: checksum
        type: u8
        doc: XXH3-64 of bytes 0..4088 (STB-R-004). Not checked here.

  find_section:
    doc: |
      Reads the directory again, up to the first entry of one type. If there is none, this runs into the zeros
      after the directory and ends with an error, since type 0 is not valid (STB-R-013).
    params:
      - id: wanted
        type: u4
        enum: section_type
    seq:
      - id: entries
        type: 'section_entry(_index == 0 ? 4096 : entries[_index - 1].next_start)'
        repeat: until
        repeat-until: _.type == wanted

  section_entry:
    -webide-representation: '{type}, at {offset:dec}, {length:dec} bytes'
    doc: Where a section is, and the section itself.
    doc-ref: Container §3.2
    params:
      - id: start
        type: u8
        doc: Where the section has to start.
    seq:
      - id: type
        type: u4
        enum: section_type
        valid:
          expr: _ != section_type::invalid
        doc: STB-R-010. Types from 0x80000000 up are for private use.
      - id: critical
        type: b1
        valid:
          expr: >-
            not _ or type == section_type::data or type == section_type::tensors or type == section_type::meta
        doc: |
          Bit 0 of flags. A reader refuses a file with a critical section of a type it does not know
          (STB-R-014).
      - id: flags_reserved
        type: b31
        valid: 0
        doc: Bits 1 to 31 of flags (STB-R-010).
      - id: offset
        type: u8
        valid:
          expr: _ == start
        doc: First byte of the section. 4096, or the next multiple of 4096 after the section before (STB-R-011).
      - id: length
        type: u8
        valid:
          expr: offset <= _root._io.size and _ <= _root._io.size - offset
        doc: Bytes, without the padding that follows. The section ends inside the file (STB-R-012).
      - id: checksum
        type: u8
        valid:
          expr: type != section_type::data or _ == 0
        doc: XXH3-64 of the section, 0 for DATA (STB-R-016). That of other sections is not checked here.
      - id: reserved
        size: 16
        type: zeros
        doc: STB-R-010.
    instances:
      end:
        value: offset + length
      next_start:
        value: (offset + length + 4095) / 4096 * 4096
        doc: Where the next section has to start, if there is one.
      body:
        io: _root._io
        pos: offset
        size: length
        type:
          switch-on: type
          cases:
            'section_type::tensors': tensors_section
            'section_type::meta': meta_section
        doc: |
          The section. DATA and sections of other types are bytes; to look at DATA, use the payloads of the
          tensors.
      gap:
        io: _root._io
        pos: offset + length
        size: '(next_start < _root._io.size ? next_start : _root._io.size) - offset - length'
        type: zeros
        doc: Bytes up to the next section (STB-R-015). None after the last section.

  tensors_section:
    doc: A header, one entry per tensor, then all names without separators.
    doc-ref: Container §3.3
    seq:
      - id: count
        type: u4
        valid:
          min: 1
          max: 1048576
        doc: Number of tensors (STB-R-030).
      - id: entry_size
        type: u4
        valid: 96
        doc: STB-R-030.
      - id: names_length
        type: u8
        valid:
          expr: _ == _io.size - 16 - 96 * count
        doc: Bytes of all names. With header and entries they are the section (STB-R-030).
      - id: entries
        type: >-
          tensor_entry(_index == 0 ? 0 : entries[_index - 1].name_end,
          _index == 0 ? 0 : entries[_index - 1].end)
        repeat: expr
        repeat-expr: count
        doc: In the order of their names and payloads.
    instances:
      after_names:
        pos: 16 + 96 * count + entries.last.name_end
        size-eos: true
        valid:
          expr: _.length == 0
        doc: Nothing. The names end with the last one (STB-R-032).

  tensor_entry:
    -webide-representation: '{name}, {encoding}'
    doc: |
      One tensor. Not checked here are the characters of names (STB-R-032), that names are unique (STB-R-033),
      checksums (STB-R-040) and what is inside payloads (STB-R-041 to 046).
    doc-ref: Container §3.3
    params:
      - id: name_start
        type: u8
        doc: Where the name has to start within the names.
      - id: previous_end
        type: u8
        doc: End of the payload before, within DATA.
    seq:
      - id: name_offset
        type: u4
        valid:
          expr: _ == name_start
        doc: First byte of the name within the names. They have no gaps (STB-R-032).
      - id: name_length
        type: u2
        valid:
          expr: _ >= 1 and _ <= 255 and name_start + _ <= _parent.names_length
        doc: 1 to 255. The name ends inside the names (STB-R-032).
      - id: ndim
        type: u1
        valid:
          min: 1
          max: 4
        doc: Number of dimensions (STB-R-031).
      - id: reserved1
        type: u1
        valid: 0
        doc: STB-R-034.
      - id: encoding
        type: u4
        enum: encoding
        valid:
          expr: >-
            ndim == 2 or (_ != encoding::int_group and _ != encoding::odd_group
            and _ != encoding::stbllm and _ != encoding::nm and _ != encoding::mixed_rows
            and _ != encoding::trellis)
        doc: |
          How the weights are stored. Ids from 0x80000000 up are for private use. Encodings 16, 17, 32, 48,
          64 and 80 are for two dimensions (STB-R-037).
        doc-ref: Encodings
      - id: reserved2
        type: u4
        valid: 0
        doc: STB-R-034.
      - id: params
        size: 16
        type:
          switch-on: encoding
          cases:
            'encoding::f32': dense_params
            'encoding::f16': dense_params
            'encoding::bf16': dense_params
            'encoding::int_group': int_group_params
            'encoding::odd_group': int_group_params
            'encoding::stbllm': stbllm_params
            'encoding::nm': nm_params
        doc: |
          Parameters of the encoding (STB-R-036). Bytes for mixed rows (Encodings §6), trellis codes (§7) and
          for an encoding that is not known.
      - id: dims
        type: u8
        repeat: expr
        repeat-expr: ndim
        doc: The shape. The last dimension runs fastest (STB-R-031, checked with `offset`).
      - id: dims_unused
        size: 8 * (4 - ndim)
        type: zeros
        doc: STB-R-031.
      - id: offset
        type: u8
        valid:
          expr: has_valid_shape and _ == (previous_end + 63) / 64 * 64
        doc: |
          First byte of the payload within DATA. 0, or the next multiple of 64 after the payload before
          (STB-R-035). The values of `dims` (STB-R-031) are checked here, too.
      - id: length
        type: u8
        valid:
          expr: 'is_known ? _ == known_length : true'
        doc: |
          Bytes of the payload. For a known encoding, what shape and parameters give (STB-R-038). For others any
          length that fits, 0 too.
      - id: checksum
        type: u8
        doc: XXH3-64 of the payload (STB-R-040). Not checked here.
      - id: reserved3
        type: u8
        valid: 0
        doc: STB-R-034.
    instances:
      name:
        -webide-parse-mode: eager
        io: _parent._io
        pos: 16 + 96 * _parent.count + name_offset
        size: name_length
        type: str
        encoding: ASCII
        doc: All bytes are from 0x21 to 0x7E (STB-R-032).
      payload:
        io: _root._io
        pos: _root.find_data.entries.last.offset + offset
        size: length
        type:
          switch-on: encoding
          cases:
            'encoding::int_group': int_group_payload
            'encoding::odd_group': int_group_payload
            'encoding::stbllm': stbllm_payload
            'encoding::nm': nm_payload
        doc: |
          The stored bytes, cut into segments for encodings 16, 17, 32 and 48. For dense tensors, the elements
          in row-major order. Bytes for mixed rows, trellis codes and for an encoding that is not
          known.
        doc-ref: Encodings §1
      gap:
        io: _root._io
        pos: _root.find_data.entries.last.offset + previous_end
        size: offset - previous_end
        type: zeros
        doc: Bytes between the payload before and this one (STB-R-039).
      end:
        value: offset + length
        doc: End of the payload within DATA.
      name_end:
        value: name_offset + name_length
      has_valid_shape:
        value: >-
          dims[0] >= 1 and dims[0] <= 4294967295
          and (ndim < 2 or dims[1] >= 1 and dims[1] <= 4294967295
          and dims[1] <= 281474976710656 / dims[0])
          and (ndim < 3 or dims[2] >= 1 and dims[2] <= 4294967295
          and dims[2] <= 281474976710656 / (dims[0] * dims[1]))
          and (ndim < 4 or dims[3] >= 1 and dims[3] <= 4294967295
          and dims[3] <= 281474976710656 / (dims[0] * dims[1] * dims[2]))
        doc: |
          Dimensions of 1 to 2^32-1, at most 2^48 elements (STB-R-031). Written so that nothing overflows.
      elements:
        value: >-
          dims[0] * (ndim < 2 ? 1 : dims[1]) * (ndim < 3 ? 1 : dims[2]) * (ndim < 4 ? 1 : dims[3])
        doc: Number of weights.
      is_known:
        value: >-
          encoding == encoding::f32 or encoding == encoding::f16 or encoding == encoding::bf16
          or encoding == encoding::int_group or encoding == encoding::odd_group
          or encoding == encoding::stbllm or encoding == encoding::nm
      known_length:
        value: >-
          encoding == encoding::int_group or encoding == encoding::odd_group
          ? params.as<int_group_params>.payload_length
          : encoding == encoding::stbllm ? params.as<stbllm_params>.payload_length
          : encoding == encoding::nm ? params.as<nm_params>.payload_length
          : encoding == encoding::f32 ? elements * 4
          : elements * 2
        doc: Bytes of the payload for an encoding that is known (STB-R-038).

  dense_params:
    doc: No parameters.
    doc-ref: Encodings §2
    seq:
      - id: reserved
        size: 16
        type: zeros
        doc: STB-R-036.

  int_group_params:
    doc: Parameters of integer groups, and the lengths that follow from them.
    doc-ref: Encodings §3
    seq:
      - id: bits
        type: u1
        valid:
          expr: >-
            _parent.encoding == encoding::int_group ? _ == 4 or _ == 8 : _ >= 1 and _ <= 3
        doc: Bits of a code, 4 or 8 for encoding 16, 1 to 3 for encoding 17 (STB-R-036).
      - id: reserved1
        type: u1
        valid: 0
        doc: STB-R-036.
      - id: group
        type: u2
        valid:
          any-of: [32, 64, 128]
        doc: Columns that share a scale, G (STB-R-036).
      - id: reserved2
        size: 12
        type: zeros
        doc: STB-R-036.
    instances:
      rows:
        value: _parent.dims[0]
      cols:
        value: _parent.dims[1]
      groups:
        value: (cols + group - 1) / group
        doc: Groups in a row, n.
      codes_length:
        value: rows * groups * group * bits / 8
      scales_start:
        value: (codes_length + 63) / 64 * 64
      scales_length:
        value: rows * groups * 2
      payload_length:
        value: scales_start + scales_length

  int_group_payload:
    doc-ref: Encodings §3
    seq:
      - id: codes
        size: layout.codes_length
        doc: |
          Rows one after another, units of 32 columns in order, each row padded to whole groups. Rows of 3 bits
          are two planes.
      - id: gap1
        size: layout.scales_start - layout.codes_length
        type: zeros
        doc: STB-R-041.
      - id: scales
        size: layout.scales_length
        doc: f16, one per row and group.
    instances:
      layout:
        value: _parent.params.as<int_group_params>

  stbllm_params:
    doc: Parameters of STBLLM, and the lengths that follow from them.
    doc-ref: Encodings §4
    seq:
      - id: n
        type: u1
        valid:
          min: 1
          max: 8
        doc: Weights kept of each 8, N (STB-R-036).
      - id: reserved1
        type: u1
        valid: 0
        doc: STB-R-036.
      - id: block
        type: u2
        valid:
          expr: _ >= 32 and _ % 32 == 0
        doc: Columns that share scales, B (STB-R-036).
      - id: reserved2
        size: 12
        type: zeros
        doc: STB-R-036.
    instances:
      rows:
        value: _parent.dims[0]
      cols:
        value: _parent.dims[1]
      units:
        value: (cols + 63) / 64
        doc: Units of 64 columns in a row, u.
      blocks:
        value: (cols + block - 1) / block
        doc: Blocks in a row, b.
      salient_length:
        value: units * 8
      states_start:
        value: (salient_length + 63) / 64 * 64
      states_length:
        value: rows * units * 16
      signs_start:
        value: (states_start + states_length + 63) / 64 * 64
      signs_length:
        value: rows * units * n
      scales_start:
        value: (signs_start + signs_length + 63) / 64 * 64
      scales_length:
        value: rows * blocks * 10
      payload_length:
        value: scales_start + scales_length

  stbllm_payload:
    doc-ref: Encodings §4
    seq:
      - id: salient
        size: layout.salient_length
        doc: u64 per unit. A bit is set for a salient column.
      - id: gap1
        size: layout.states_start - layout.salient_length
        type: zeros
        doc: STB-R-041.
      - id: states
        size: layout.states_length
        doc: Per row and unit, u64 low and u64 high. The state of a weight is low + 2 * high of its bits.
      - id: gap2
        size: layout.signs_start - layout.states_start - layout.states_length
        type: zeros
        doc: STB-R-041.
      - id: signs
        size: layout.signs_length
        doc: Per row and unit, N bytes. A set bit is a minus.
      - id: gap3
        size: layout.scales_start - layout.signs_start - layout.signs_length
        type: zeros
        doc: STB-R-041.
      - id: scales
        size: layout.scales_length
        doc: Per row and block, five f16.
    instances:
      layout:
        value: _parent.params.as<stbllm_params>

  nm_params:
    doc: Parameters of N:M sparse signs, and the lengths that follow from them.
    doc-ref: Encodings §5
    seq:
      - id: n
        type: u1
        valid:
          any-of: [1, 2]
        doc: Weights kept of each M at most, N (STB-R-036).
      - id: m
        type: u1
        valid:
          any-of: [4, 8]
        doc: Weights that share a code, M (STB-R-036).
      - id: scale_bits
        type: u1
        valid:
          any-of: [0, 4, 8]
        doc: Bits of the code of a block scale, 0 without block scales (STB-R-036).
      - id: has_column_factors
        type: b1
        doc: Bit 0 of flags.
      - id: flags_reserved
        type: b7
        valid: 0
        doc: Bits 1 to 7 of flags (STB-R-036).
      - id: block
        type: u2
        valid:
          expr: 'scale_bits == 0 ? _ == 0 : _ >= 32 and _ % 32 == 0'
        doc: Columns that share a block scale, B, 0 without block scales (STB-R-036).
      - id: reserved
        size: 10
        type: zeros
        doc: STB-R-036.
    instances:
      rows:
        value: _parent.dims[0]
      cols:
        value: _parent.dims[1]
      code_bits:
        value: 'n * (m == 4 ? 2 : 3) + 1'
        doc: Bits of a code. Its binary digits are the planes of widths 4, 2 and 1.
        doc-ref: Encodings §5.1
      tiles:
        value: (rows + 15) / 16
        doc: Tiles of 16 rows.
      groups:
        value: (cols + m - 1) / m
        doc: Groups of M columns in a row, g.
      quads:
        value: (groups + 3) / 4
        doc: Quads of 4 groups in a row, Q.
      chunks:
        value: quads / 8
        doc: Whole chunks in a row.
      quads_left:
        value: quads % 8
        doc: Quads of the last chunk, if it is not whole.
      left4:
        value: (quads_left * 4 + 7) / 8
        doc: Vectors that a plane of width 4 has for `quads_left`.
      left2:
        value: (quads_left * 2 + 7) / 8
        doc: Vectors that a plane of width 2 has for them.
      left1:
        value: (quads_left + 7) / 8
        doc: Vectors that a plane of width 1 has for them.
      tile_length:
        value: >-
          64 * (code_bits * chunks
          + code_bits / 4 % 2 * left4 + code_bits / 2 % 2 * left2 + code_bits % 2 * left1)
        doc: Bytes of the codes of a tile, tile_bytes.
        doc-ref: Encodings §5.2
      blocks:
        value: 'block == 0 ? 0 : (cols + block - 1) / block'
        doc: Blocks in a row, b.
      column_factors_length:
        value: 'has_column_factors ? cols * 2 : 0'
      row_scales_start:
        value: (column_factors_length + 63) / 64 * 64
      row_scales_length:
        value: rows * 2
      block_scales_start:
        value: (row_scales_start + row_scales_length + 63) / 64 * 64
      block_scales_length:
        value: tiles * blocks * 2 * scale_bits
      codes_start:
        value: (block_scales_start + block_scales_length + 63) / 64 * 64
      codes_length:
        value: tiles * tile_length
      payload_length:
        value: codes_start + codes_length

  nm_payload:
    doc-ref: Encodings §5.2, §5.3
    seq:
      - id: column_factors
        size: layout.column_factors_length
        doc: f16 per column, or nothing.
      - id: gap1
        size: layout.row_scales_start - layout.column_factors_length
        type: zeros
        doc: STB-R-041.
      - id: row_scales
        size: layout.row_scales_length
        doc: f16 per row.
      - id: gap2
        size: layout.block_scales_start - layout.row_scales_start - layout.row_scales_length
        type: zeros
        doc: STB-R-041.
      - id: block_scales
        size: layout.block_scales_length
        doc: Codes by tile, then block, then row, or nothing.
      - id: gap3
        size: layout.codes_start - layout.block_scales_start - layout.block_scales_length
        type: zeros
        doc: STB-R-041.
      - id: tiles
        size: layout.tile_length
        repeat: expr
        repeat-expr: layout.tiles
        doc: Codes of 16 rows each, in chunks of 8 quads, each chunk in planes.
    instances:
      layout:
        value: _parent.params.as<nm_params>

  meta_section:
    doc: A header, then entries one after another.
    doc-ref: Metadata §1
    seq:
      - id: count
        type: u4
        valid:
          max: 4096
        doc: Number of entries (STB-R-021).
      - id: reserved
        type: u4
        valid: 0
        doc: STB-R-020.
      - id: entries
        type: 'meta_entry(_index == 0 ? "" : entries[_index - 1].key)'
        repeat: expr
        repeat-expr: count
        doc: In the order of their keys.
      - id: after_entries
        size-eos: true
        valid:
          expr: _.length == 0
        doc: Nothing. The entries fill the section (STB-R-020).

  meta_entry:
    -webide-representation: '{key}'
    doc: A key and its value.
    doc-ref: Metadata §1
    params:
      - id: previous_key
        type: str
    seq:
      - id: key_length
        type: u2
        valid:
          min: 1
          max: 255
        doc: STB-R-021.
      - id: type
        type: u1
        enum: value_type
        valid:
          any-of:
            - value_type::text
            - value_type::u64
            - value_type::f64
            - value_type::bool
            - value_type::u64_list
            - value_type::deflated_text
        doc: |
          Type of the value (STB-R-024). That deflated texts are in files with a min_reader of 2 only is not
          checked here.
      - id: reserved
        type: u1
        valid: 0
        doc: STB-R-025.
      - id: value_length
        type: u4
        valid:
          expr: >-
            type == value_type::text ? _ <= 268435456
            : type == value_type::u64_list ? _ <= 268435456 and _ % 8 == 0
            : type == value_type::bool ? _ == 1
            : type == value_type::deflated_text ? _ >= 8 and _ <= 268435456
            : _ == 8
        doc: At most 2^28 (STB-R-021), and the length of the type (STB-R-025).
      - id: key
        size: key_length
        type: str
        encoding: ASCII
        valid:
          expr: _ > previous_key
        doc: |
          The characters are a-z, 0-9, ".", "_" and "-" (STB-R-022); this is not checked here. Keys ascend
          (STB-R-023). Keys that start with "x." are for private use.
      - id: value
        size: value_length
        type:
          switch-on: type
          cases:
            'value_type::text': text_value
            'value_type::u64': u64_value
            'value_type::f64': f64_value
            'value_type::bool': bool_value
            'value_type::u64_list': u64_list_value
            'value_type::deflated_text': deflated_text_value
        doc: STB-R-025.

  text_value:
    seq:
      - id: value
        type: str
        size-eos: true
        encoding: UTF-8
        doc: UTF-8 without a terminator. U+0000 is allowed. It may hold control sequences for terminals.

  deflated_text_value:
    seq:
      - id: length
        type: u8
        valid:
          max: 268435456
        doc: Bytes of the text. The sum of those of a file is at most 2^28 (STB-R-021); this is not checked here.
      - id: stream
        size-eos: true
        doc: The text as raw DEFLATE, without a zlib header (STB-R-026). It is not inflated here.

  u64_value:
    -webide-representation: '{value:dec}'
    seq:
      - id: value
        type: u8

  f64_value:
    -webide-representation: '{value}'
    seq:
      - id: value
        type: f8
        valid:
          expr: _ >= -1.7976931348623157e+308 and _ <= 1.7976931348623157e+308
        doc: Finite (STB-R-025).

  bool_value:
    -webide-representation: '{value:dec}'
    seq:
      - id: value
        type: u1
        valid:
          max: 1
        doc: 0 is false, 1 is true (STB-R-025).

  u64_list_value:
    seq:
      - id: values
        type: u8
        repeat: eos
        doc: Any number of elements, none too.

enums:
  section_type:
    0:
      id: invalid
      doc: Never valid (STB-R-010).
    1:
      id: data
      doc: Payloads (Container §2).
    2:
      id: tensors
      doc: Names, shapes and encodings (Container §3.3).
    3:
      id: meta
      doc: Metadata (Metadata §1).
    16:
      id: strong_digest
      doc: Reserved for a later revision (Container §3.4).
    17:
      id: signature
      doc: Reserved for a later revision (Container §3.4).
  encoding:
    1:
      id: f32
      doc: Dense binary32 (Encodings §2).
    2:
      id: f16
      doc: Dense binary16 (Encodings §2).
    3:
      id: bf16
      doc: Dense, the upper half of a binary32 (Encodings §2).
    16:
      id: int_group
      doc: Integers of 4 or 8 bits in groups (Encodings §3).
    17:
      id: odd_group
      doc: Odd integers of 1 to 3 bits in groups (Encodings §3).
    32:
      id: stbllm
      doc: The structure of the STBLLM paper (Encodings §4).
    48:
      id: nm
      doc: N:M sparse signs (Encodings §5).
    64:
      id: mixed_rows
      doc: All rows in one encoding, some a second time in another (Encodings §6). Not taken apart here.
    80:
      id: trellis
      doc: Circular bit streams, windows of which are looked up in tables (Encodings §7). Not taken apart here.
  value_type:
    1:
      id: text
      doc: UTF-8 (Metadata §1).
    2: u64
    3: f64
    4:
      id: bool
      doc: 1 byte, 0 or 1 (Metadata §1).
    5:
      id: u64_list
      doc: 8 bytes per element (Metadata §1).
    6:
      id: deflated_text
      doc: A length and a stream of DEFLATE (Metadata §1).
